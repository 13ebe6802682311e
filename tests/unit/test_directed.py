"""What replay and the directed tests call a fault, on rows written by hand."""

import math

import numpy as np
import pytest

from kvdrift.instruments.directed import judge_replay
from kvdrift.instruments.replay import Projection, ReplayRow
from kvdrift.replay.attention import Operands, attend, score_conditioning, score_sizes
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import Site

U = 2.0**-8
N_UNITS = 16


def row(unit: int, *, error: float = 0.0, from_scores: float = 0.0, scale: float = 0.0) -> ReplayRow:
    noise = 1e-9 * float(np.random.default_rng(unit).standard_normal())
    projections = {Cause("score_scale"): {"decode": Projection(scale + noise, 1.0), "prefill": Projection(0.0, 1.0)}}
    return ReplayRow("kv_aligned", "p", unit, 0, {"decode": error, "prefill": 0.0}, projections, from_scores)


def judged(**options: float) -> tuple[int, list[str]]:
    found = judge_replay(
        [row(unit, **options) for unit in range(N_UNITS)], "kv_aligned", Arithmetic("bfloat16"), 1e-3, 0
    )
    return len(found.beyond), [cause.cause for cause in found.causes]


def test_large_scores_are_allowed_what_their_rounding_does() -> None:
    assert judged(error=20 * U)[0] == N_UNITS
    assert judged(error=20 * U, from_scores=10 * U)[0] == 0
    assert judged(error=30 * U, from_scores=10 * U)[0] == N_UNITS


@pytest.mark.parametrize(("size", "causes"), [(1e-3, ["score_scale"]), (1e-6, [])])
def test_a_cause_that_is_certain_and_tiny_is_no_fault(size: float, causes: list[str]) -> None:
    """Kernels may hold constants in float32: a bias of one part in a million is sure to be there, and none."""
    assert judged(scale=size)[1] == causes


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_an_output_that_is_not_finite_is_beyond_rounding_and_has_no_direction(wrong: float) -> None:
    """As from a kernel of decode that overflows on sound operands."""
    projections = {Cause.SCORE_SCALE: {"decode": Projection(wrong, 1.0), "prefill": Projection(0.0, 1.0)}}
    rows = [row(unit) for unit in range(N_UNITS - 1)]
    rows.append(ReplayRow("kv_aligned", "p", N_UNITS, 0, {"decode": wrong, "prefill": 0.0}, projections))
    found = judge_replay(rows, "kv_aligned", Arithmetic("bfloat16"), 1e-3, 0)
    assert list(found.beyond) == [Address("p", N_UNITS, 0, Site.ATTN_CTX)]
    size, directed = found.evidence
    assert size.supports == "H1"
    assert not directed.valid
    assert directed.reason is not None
    assert "finite" in directed.reason


@pytest.mark.parametrize("n_units", [12, 48])
def test_passes_that_agree_bit_for_bit_do_not_claim_to_see_below_rounding(n_units: int) -> None:
    projections = {Cause("score_scale"): {name: Projection(0.0, 4.0) for name in ("decode", "prefill")}}
    rows = [ReplayRow("kv_aligned", "p", u, 0, {"decode": 0.0, "prefill": 0.0}, projections) for u in range(n_units)]
    (directed,) = [
        e
        for e in judge_replay(rows, "kv_aligned", Arithmetic("bfloat16"), 1e-3, 0).evidence
        if e.instrument == "directed"
    ]
    # Six errors of a mean of n differences of two roundings, uniform within a roundoff, in a direction of norm 2, above
    # the share of a roundoff that kernels may be biased by.
    sure = 6.0 * U * np.sqrt(2.0 / 3.0) / 2.0 / np.sqrt(n_units)
    assert directed.minimum_detectable == pytest.approx(sure + U / 8.0)


def test_rounding_of_scores_matters_as_much_as_they_are_large() -> None:
    rng = np.random.default_rng(0)
    query, keys, values = rng.normal(size=(2, 8)), rng.normal(size=(6, 1, 8)), rng.normal(size=(6, 1, 4))

    def moved(factor: float) -> float:
        operands = Operands(factor * query, keys, values, np.arange(6), 5, AttentionSpec(0.35))
        return score_conditioning(operands, attend(operands), score_sizes(operands))

    assert 4.0 < moved(8.0) / moved(1.0) < 16.0


@pytest.mark.parametrize(("wrong", "size"), [((1,), 1e-2), ((0, 1, 2, 3), 1e-2)])
def test_the_size_of_a_cause_is_that_of_the_layers_that_have_it(wrong: tuple[int, ...], size: float) -> None:
    rows = []
    for unit in range(N_UNITS):
        for layer in range(4):
            noise = 1e-6 * float(np.random.default_rng((unit, layer)).standard_normal())
            along = noise + (size if layer in wrong else 0.0)
            projections = {Cause("score_scale"): {"decode": Projection(along, 1.0), "prefill": Projection(0.0, 1.0)}}
            rows.append(ReplayRow("kv_aligned", "p", unit, layer, {"decode": 0.0, "prefill": 0.0}, projections))
    (cause,) = judge_replay(rows, "kv_aligned", Arithmetic("bfloat16"), 1e-3, 0).causes
    assert cause.layer == wrong[0]
    assert cause.size == pytest.approx(size, rel=1e-2)


@pytest.mark.parametrize(
    ("step", "claimed"), [(0.0, 6.0 * U * np.sqrt(2.0 / 3.0) / 2.0 / np.sqrt(12) + U / 8.0), (U, U)]
)
def test_no_factor_is_claimed_below_the_step_in_which_attention_keeps_its_numbers(step: float, claimed: float) -> None:
    """Bfloat16 scores times 1.001 are the same scores."""
    projections = {Cause("score_scale"): {name: Projection(0.0, 4.0) for name in ("decode", "prefill")}}
    rows = [
        ReplayRow("kv_aligned", "p", u, 0, {"decode": 0.0, "prefill": 0.0}, projections, step=step) for u in range(12)
    ]
    (directed,) = [
        e
        for e in judge_replay(rows, "kv_aligned", Arithmetic("bfloat16"), 1e-3, 0).evidence
        if e.instrument == "directed"
    ]
    assert directed.minimum_detectable == pytest.approx(claimed)
