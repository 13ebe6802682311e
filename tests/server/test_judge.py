"""The rule on made-up drift: what rounding can look like raises no alarm, what it cannot look like does."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from kvdrift.server.judge import judge
from kvdrift.server.outcome import ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.rounding import ROUNDING
from kvdrift.server.values import (
    DECODE_BATCHED,
    DECODE_SOLO,
    DECODE_WARM,
    DECODES,
    PREFILL_LONGER,
    SPOILED,
    Captured,
    LogprobPair,
    ServedPrompt,
    ServerFacts,
)
from tests.support.matrix import further

N_PROMPTS, SPAN = 12, 32
Drift = Callable[[str, np.ndarray], np.ndarray]  # of a route at positions


def facts(dtype: str | None) -> ServerFacts:
    return ServerFacts(
        dialect="vLLM", url="http://host/v1", model="m", dtype=dtype, dtype_from="--dtype" if dtype else None
    )


def captured(drift: Drift, *, seed: int = 0, first_position: int = 10) -> Captured:
    """Pairs of every decode route with the drift given, of an exact longer prefill, and of a control of one nat."""
    rng = np.random.default_rng(seed)
    found = Captured()
    for i in range(N_PROMPTS):
        name, start = f"p{i:02}", first_position + 2 * i
        found.prompts.append(ServedPrompt(name, (1,) * start, None, start))
        reference = -rng.exponential(2.0, SPAN)
        for route in (*DECODES, PREFILL_LONGER, SPOILED):
            positions = np.arange(start, start + SPAN)
            if route == SPOILED:
                moved = rng.normal(size=SPAN)
            else:
                moved = np.zeros(SPAN) if route == PREFILL_LONGER else drift(route, positions)
            found.pairs += [
                LogprobPair(
                    prompt=name, route=route, index=k, position=start + k, token=5,
                    value=float(reference[k] + moved[k]), reference=float(reference[k]),
                )
                for k in range(SPAN)
            ]  # fmt: skip
    return found


def judged(drift: Drift, dtype: str | None, *, seed: int = 0, **options: float) -> ServerDecision:
    return judge(captured(drift, seed=seed), facts(dtype), ServerPlan(**options))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", None, *further(*(dtype for dtype in ROUNDING if dtype != "float32"))])
@pytest.mark.parametrize("times", [0.0, *(pytest.param(times, marks=pytest.mark.matrix) for times in (0.1, 1.0)), 2.0])
def test_drift_of_the_size_of_rounding_is_never_a_mismatch_although_prefill_repeats_itself(
    dtype: str | None, times: float
) -> None:
    size = times * ROUNDING[dtype or "bfloat16"]
    for seed in range(5):
        rng = np.random.default_rng(seed)
        decision = judged(lambda route, at: rng.standard_t(6, at.size) * size, dtype, seed=seed)  # noqa: B023
        assert decision.verdict != "MISMATCH", decision.routes
        if times == 0.1 and dtype in ("float32", "float16"):
            assert decision.verdict == "STRUCTURAL_DRIFT", decision.reasons


@pytest.mark.parametrize("dtype", [*ROUNDING, None])
def test_drift_far_beyond_rounding_is_a_mismatch(dtype: str | None) -> None:
    rng = np.random.default_rng(1)
    size = 8.0 * ROUNDING[dtype or "bfloat16"]

    assert judged(lambda route, at: rng.normal(size=at.size) * size, dtype).verdict == "MISMATCH"


def test_batched_decode_that_agrees_bit_by_bit_makes_the_single_step_no_fault() -> None:
    """The batched step took the matrix product of the prefill, and the single one did not."""
    rng = np.random.default_rng(2)

    def drift(route: str, at: np.ndarray) -> np.ndarray:
        return np.zeros(at.size) if route == DECODE_BATCHED else 6e-2 * rng.normal(size=at.size)

    decision = judged(drift, "bfloat16")

    assert decision.verdict == "INCONCLUSIVE"
    assert not any(r.beyond for r in decision.routes)


@pytest.mark.parametrize(("largest", "verdict"), [(0.1, "STRUCTURAL_DRIFT"), (0.3, "INCONCLUSIVE")])
def test_a_route_that_repeats_some_texts_in_every_digit_need_not_stand_out_as_the_others_do(
    largest: float, verdict: str
) -> None:
    """Some prompts beside neighbours without a digit changed, the others at up to half of the bound (or above it)."""
    rng = np.random.default_rng(6)
    sizes = iter([0.0, 0.0, 0.0, *np.linspace(0.01, largest, 9)])

    def drift(route: str, at: np.ndarray) -> np.ndarray:
        return (next(sizes) if route == DECODE_BATCHED else 0.02) * rng.normal(size=at.size)

    decision = judged(drift, "bfloat16")

    assert decision.verdict == verdict, decision.reasons


def test_drift_that_begins_at_a_tile_as_with_an_fp8_cache_is_no_fault() -> None:
    rng = np.random.default_rng(3)

    def drift(route: str, at: np.ndarray) -> np.ndarray:
        return np.where(at >= 32, 0.06 * rng.normal(size=at.size), 0.0)

    decision = judged(drift, "bfloat16")

    assert decision.verdict == "INCONCLUSIVE"
    solo = next(r for r in decision.routes if r.route == DECODE_SOLO)
    assert solo.change is not None
    assert solo.change.position == 32


@pytest.mark.parametrize("route", [DECODE_WARM, DECODE_BATCHED])
def test_one_route_far_from_decode_alone_is_a_mismatch_though_below_the_bound_of_the_dtype(route: str) -> None:
    rng = np.random.default_rng(4)

    def drift(found: str, at: np.ndarray) -> np.ndarray:
        return (0.2 if found == route else 0.005) * rng.normal(size=at.size)

    decision = judged(drift, "bfloat16")

    assert decision.verdict == "MISMATCH"
    assert [r.route for r in decision.routes if r.beyond] == [route]


def test_one_faulty_prompt_among_twelve_is_a_mismatch_and_named() -> None:
    count = iter(range(1000))
    rng = np.random.default_rng(5)

    def drift(route: str, at: np.ndarray) -> np.ndarray:
        faulty = route == DECODE_SOLO and next(count) == 7
        return (2.0 if faulty else 0.01) * rng.normal(size=at.size)

    decision = judged(drift, "bfloat16")

    assert decision.verdict == "MISMATCH"
    assert decision.first_failure is not None
    assert (decision.first_failure.prompt, decision.first_failure.route) == ("p07", DECODE_SOLO)


def test_a_noise_that_is_itself_beyond_rounding_does_not_widen_the_bound() -> None:
    rng = np.random.default_rng(6)
    found = captured(lambda route, at: 1e-6 * rng.normal(size=at.size))
    noisy = [
        LogprobPair(
            prompt=p.prompt, route=p.route, index=p.index, position=p.position, token=5,
            value=p.value + 0.5 * float(rng.normal()), reference=p.reference,
        )
        if p.route == PREFILL_LONGER
        else p
        for p in found.pairs
    ]  # fmt: skip
    found.pairs = noisy
    decision = judge(found, facts("float32"), ServerPlan())

    assert decision.verdict == "MISMATCH"
    assert decision.minimum_detectable == pytest.approx(4e-5)
    assert "prefill that does not agree with itself" in str(decision.diagnosis)


def test_nothing_compared_is_inconclusive() -> None:
    decision = judge(Captured(), facts("float32"), ServerPlan())

    assert decision.verdict == "INCONCLUSIVE"
    assert decision.reasons[0].text == "no decoded token was compared"


def test_exact_agreement_without_proof_of_a_prefill_does_not_pass() -> None:
    exact = captured(lambda route, at: np.zeros(at.size))
    assert judge(exact, facts("float32"), ServerPlan()).verdict == "INCONCLUSIVE"

    exact.n_computed_all = True
    assert judge(exact, facts("float32"), ServerPlan()).verdict == "STRUCTURAL_DRIFT"


def test_a_control_that_is_not_seen_does_not_pass() -> None:
    rng = np.random.default_rng(7)
    found = captured(lambda route, at: 1e-6 * rng.normal(size=at.size))
    assert judge(found, facts("float32"), ServerPlan()).verdict == "STRUCTURAL_DRIFT"

    found.pairs = [p for p in found.pairs if p.route != SPOILED]
    decision = judge(found, facts("float32"), ServerPlan())
    assert decision.verdict == "INCONCLUSIVE"
    assert "positive control was not seen" in decision.reasons[0].text
