"""The estimates against what they estimate, and the change point against planted ones."""

import numpy as np
import pytest

from kvdrift.server.estimates import STEPS, change_point, curve, divergence, lag, rms


def sampled(seed: int, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two distributions q and p over 50 tokens, and n tokens sampled from q."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=50)
    q = np.exp(logits) / np.exp(logits).sum()
    other = logits + 0.3 * rng.normal(size=50)
    p = np.exp(other) / np.exp(other).sum()
    return q, p, rng.choice(50, size=n, p=q)


def test_k1_and_k3_estimate_kl_and_chi2_the_chi_square_divergence() -> None:
    q, p, tokens = sampled(1, 200_000)
    found = divergence(np.log(q[tokens]), np.log(p[tokens]))

    assert found.k3 == pytest.approx(float((q * np.log(q / p)).sum()), rel=0.03)
    assert found.k1 == pytest.approx(float((q * np.log(q / p)).sum()), rel=0.05)
    assert found.chi2 == pytest.approx(float(((p - q) ** 2 / q).sum()), rel=0.05)


def test_on_the_most_likely_tokens_k3_is_no_kl() -> None:
    """Why the audit samples: a greedy token says nothing about the rest of the distribution."""
    q, p = np.array([0.5, 0.3, 0.2]), np.array([0.5, 0.2, 0.3])
    greedy = np.zeros(1000, dtype=int)
    assert divergence(np.log(q[greedy]), np.log(p[greedy])).k3 == 0.0
    assert float((q * np.log(q / p)).sum()) > 0.04


def test_k3_is_never_negative_and_zero_only_for_equal_logprobs() -> None:
    rng = np.random.default_rng(0)
    value = rng.normal(size=1000)
    assert divergence(value, value).k3 == 0.0
    assert divergence(value, value + 1e-3 * rng.normal(size=1000)).k3 > 0.0


def test_a_gap_too_large_for_a_float_is_infinite_and_no_error() -> None:
    assert divergence(np.array([-9999.0]), np.array([-0.1])).k3 == float("inf")


def test_nan_is_never_averaged_away() -> None:
    assert np.isnan(rms(np.array([0.0, np.nan])))
    assert np.isnan(divergence(np.array([0.0, np.nan]), np.zeros(2)).k3)


@pytest.mark.parametrize("step", [16, 32, 64])
def test_a_change_point_is_found_at_its_boundary(step: int) -> None:
    rng = np.random.default_rng(3)
    places = [int(i) for i in np.tile(np.arange(4, 100), 3)]
    groups = [f"p{i}" for i in range(3) for _ in range(96)]
    drift = rng.normal(size=288) * np.where(np.array(places) >= step, 1.0, 0.01)
    found = change_point(places, groups, drift, floor=1e-3, seed=0)

    assert found is not None
    assert found.position == step
    assert found.p_value == pytest.approx(0.001)


def test_without_a_change_the_p_value_is_an_ordinary_one() -> None:
    rng = np.random.default_rng(4)
    p_values = []
    for _ in range(40):
        drift = rng.normal(size=96)
        found = change_point(list(range(4, 100)), ["p"] * 96, drift, floor=1e-6, seed=0, n_shuffles=99)
        assert found is not None
        p_values.append(found.p_value)
    assert sum(p <= 0.05 for p in p_values) <= 7  # binomial(40, 0.05): 8 or more have a chance below 1e-3
    assert max(p_values) > 0.5


def test_the_curve_ends_its_stretches_at_the_boundaries() -> None:
    bins = curve(range(200), np.ones(200))
    assert [b.first for b in bins] == [0, *[s for s in STEPS if s < 200]]
    assert sum(b.n for b in bins) == 200


def test_a_displacement_by_one_is_seen_in_both_directions_and_not_without_one() -> None:
    rng = np.random.default_rng(5)
    values = [rng.exponential(size=20) for _ in range(4)]
    assert lag(values, [v + 1e-3 * rng.normal(size=20) for v in values]) == 0
    assert lag(values, [np.roll(v, 1) for v in values]) == 1
    assert lag(values, [np.roll(v, -1) for v in values]) == -1
    assert lag(values, [rng.exponential(size=20) for _ in range(4)]) == 0
