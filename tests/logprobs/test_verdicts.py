"""What is said of dumps with and without a fault: verdict, sequences, position, cause, and who is off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import kvdrift
from kvdrift.logprobs.change import changes
from kvdrift.logprobs.compare import LogprobComparison
from kvdrift.logprobs.estimates import divergences
from tests.support.logprobs import N_TOKENS, Sides, log_softmax, simulate, write, write_all

BF16: dict[str, Any] = {"dtype_a": "bf16", "dtype_b": "bf16"}


@pytest.fixture(scope="module")
def sides() -> Sides:
    return simulate()


def compared(folder: Path, sides: Sides, trainer: Any = None, **options: Any) -> LogprobComparison:
    """Compare the sampler with a trainer [sequence, token] of other logprobs."""
    paths = write_all(folder, sides)
    if trainer is not None:
        write(paths["trainer"], sides.tokens, trainer)
    names: dict[str, Any] = {name: paths[options.pop(name)] for name in ("third", "repeat") if name in options}
    found = kvdrift.compare(paths["sampler"], paths["trainer"], **BF16, **names, **options)
    assert isinstance(found, LogprobComparison)
    return found


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("third", [{}, {"third": "prefill", "repeat": "repeat"}], ids=["two", "three"])
def test_rounding_alone_passes(tmp_path: Path, seed: int, third: dict[str, str]) -> None:
    found = compared(tmp_path, simulate(seed), **third)

    assert found.verdict == "STRUCTURAL_DRIFT"
    assert found.exit_code == 0
    assert (found.decision.n_beyond, found.decision.cause, found.guilty) == (0, None, None)


def test_what_the_mask_drops_is_told_apart(tmp_path: Path, sides: Sides) -> None:
    trainer = sides.logprobs("trainer")
    trainer[:3] += np.where(np.arange(N_TOKENS) % 2, 2.0, -2.0)
    found = compared(tmp_path, sides, np.minimum(trainer, 0.0), drop="tme:1.02")

    assert found.verdict == "MISMATCH"
    assert [item.name for item in found.decision.sequences if item.beyond] == ["s0", "s1", "s2"]
    drop = found.view["drop"]
    assert drop["n"] == 24
    assert drop["text"].startswith("of the 100% that it drops (24 of 24; ")
    assert drop["text"].endswith("88% are within rounding (21 of 24)")


def test_drift_from_a_position_on_is_found_there(tmp_path: Path, sides: Sides) -> None:
    trainer = sides.logprobs("trainer")
    rng = np.random.default_rng(1)
    trainer[5, 17:] += 3.0 * rng.standard_normal(N_TOKENS - 17)
    found = compared(tmp_path, sides, np.minimum(trainer, 0.0))

    first = found.decision.first
    assert first is not None
    assert first.name == "s5"
    assert first.change is not None
    assert abs(first.change - 17) <= 2
    assert found.decision.cause is not None
    assert found.decision.cause.name == "from_a_position"


def test_even_drift_has_no_change_point() -> None:
    """Errors of neighbours are alike here; any named change among five sequences has a chance of at most alpha."""
    rng = np.random.default_rng(0)
    n_named = 0
    for trial in range(40):
        rows = {i: np.repeat(rng.standard_normal(24), 2) * rng.lognormal(0.0, 1.0) for i in range(5)}
        n_named += any(item.p_value <= 0.02 for item in changes(rows, seed=trial, n_shuffles=199))
    assert n_named <= 4  # 0.8 expected; more than 4 of 40 has a chance of 1e-3


def test_a_temperature_on_one_side_is_named(tmp_path: Path, sides: Sides) -> None:
    paths = write_all(tmp_path, sides)
    write(paths["sampler"], sides.tokens, sides.logprobs("sampler"), top_logprobs=sides.top("sampler"))
    hot = {"temperature": 0.7}
    write(paths["trainer"], sides.tokens, sides.logprobs("trainer", **hot), top_logprobs=sides.top("trainer", **hot))
    found: Any = kvdrift.compare(paths["sampler"], paths["trainer"], **BF16)

    assert found.verdict == "MISMATCH"
    assert found.decision.cause.name == "temperature"
    assert "divided by 0.7" in found.decision.cause.text


def test_runners_up_tell_near_ties(tmp_path: Path, sides: Sides) -> None:
    paths = write_all(tmp_path, sides)
    for name in ("sampler", "trainer"):
        write(paths[name], sides.tokens, sides.logprobs(name), top_logprobs=sides.top(name))
    found: Any = kvdrift.compare(paths["sampler"], paths["trainer"], **BF16)
    ties = found.decision.ties

    assert ties.n_known == sides.tokens.size
    assert 0 < ties.n_moved == ties.n_moved_near < ties.n_near


@pytest.mark.parametrize("lag", [1, -1])
def test_displaced_logprobs_are_named(tmp_path: Path, sides: Sides, lag: int) -> None:
    found = compared(tmp_path, sides, np.roll(sides.logprobs("trainer"), lag, axis=1))

    assert found.verdict == "MISMATCH"
    assert found.decision.cause is not None
    assert found.decision.cause.name == "displaced"
    assert ("late" if lag == 1 else "early") in found.decision.cause.text


@pytest.mark.parametrize("guilty", ["A", "B", "third"])
def test_the_third_dump_tells_who_is_off(tmp_path: Path, guilty: str) -> None:
    sides = simulate(4)
    name = {"A": "sampler", "B": "trainer", "third": "prefill"}[guilty]
    rng = np.random.default_rng(5)
    sides.logits[name] = sides.logits[name] + 1.5 * rng.standard_normal(sides.logits[name].shape)
    if guilty == "A":
        chances = np.exp(log_softmax(sides.logits[name])).cumsum(-1)
        sides.tokens = (rng.random((*sides.tokens.shape, 1)) < chances).argmax(-1)
    found = compared(tmp_path, sides, third="prefill")

    if guilty == "third":  # A and B agree, which is what was asked
        assert found.verdict == "STRUCTURAL_DRIFT"
        return
    assert found.verdict == "MISMATCH"
    assert found.guilty == guilty


def test_two_dumps_tell_whether_the_sampler_reports_what_it_sampled_from(tmp_path: Path, sides: Sides) -> None:
    hot = simulate(2)
    hot.logits["sampler"] = (
        hot.logits["sampler"] / 0.7
    )  # tokens were drawn at temperature 1, as the trainer scores them
    found = compared(tmp_path, hot)

    assert found.verdict == "MISMATCH"
    assert found.decision.guilt is not None
    assert "did not sample from the probabilities that it reports" in found.decision.guilt.text


def test_few_sequences_are_not_a_pass(tmp_path: Path) -> None:
    found = compared(tmp_path, simulate(n=5))

    assert found.verdict == "INCONCLUSIVE"
    assert found.exit_code == 6
    assert "5 sequences give no p-value of 3.3e-04, which takes 13" in found.decision.reasons[0]


def test_one_sided_infinity_is_a_mismatch(tmp_path: Path, sides: Sides) -> None:
    trainer = sides.logprobs("trainer")
    trainer[2, 7] = -np.inf
    found = compared(tmp_path, sides, trainer)

    assert found.verdict == "MISMATCH"
    assert found.decision.n_nonfinite == 1
    assert found.decision.cause is not None
    assert found.decision.cause.name == "not_finite"
    assert json.loads(found.to_json())["n_nonfinite"] == 1


def test_tokens_with_other_experts_stand_apart(tmp_path: Path, sides: Sides) -> None:
    paths = write_all(tmp_path, sides)
    experts = [[[0, 1]] * N_TOKENS for _ in sides.tokens]
    other = [list(row) for row in experts]
    trainer = sides.logprobs("trainer")
    for i in range(0, 24, 2):
        other[i][9] = [2, 3]
        trainer[i, 9] -= 2.5
    write(paths["sampler"], sides.tokens, sides.logprobs("sampler"), experts=experts)
    write(paths["trainer"], sides.tokens, trainer, experts=other)
    found: Any = kvdrift.compare(paths["sampler"], paths["trainer"], **BF16)

    assert found.verdict == "STRUCTURAL_DRIFT"
    assert found.decision.flips.n == 12
    assert found.decision.flips.k3_with.value > 20 * found.decision.flips.k3_without.value
    write(paths["sampler"], sides.tokens, sides.logprobs("sampler"))
    assert kvdrift.compare(paths["sampler"], paths["trainer"], **BF16).verdict == "MISMATCH"


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """Tokens of one sequence share an error: intervals over tokens would be far too short."""
    rng = np.random.default_rng(3)
    sequence = np.repeat(np.arange(20), 30)
    inside = 0
    for _ in range(200):
        d = 0.1 * rng.standard_normal(20)[sequence] + 0.05 * rng.standard_normal(sequence.size)
        k1 = divergences(d, sequence, level=0.95).k1
        inside += k1.low <= 0.0 <= k1.high
    assert 180 <= inside <= 199


def test_check_raises_with_the_screen(tmp_path: Path, sides: Sides) -> None:
    compared(tmp_path, sides).check()
    with pytest.raises(kvdrift.VerdictError, match="MISMATCH: H1: 24 of 24 sequences"):
        compared(tmp_path, sides, sides.logprobs("trainer") - 2.0).check()
