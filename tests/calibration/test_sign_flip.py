"""The sign-flip test keeps its promised rate of false alarms, for dependent tests too, and has the power it claims."""

import math

import numpy as np
import pytest

from kvdrift.instruments.sign_flips import sign_flip_max_t


def test_false_alarms_stay_at_alpha_whatever_the_dependence_of_the_tests() -> None:
    """A correct test fails this by chance once in about 31 000 runs (4 sigma); the seed makes it repeatable."""
    rng, alpha, n = np.random.default_rng(20260101), 0.05, 1500
    alarms = 0
    for _ in range(n):
        common = rng.standard_t(3, size=10)
        values = 0.7 * common + 0.3 * rng.standard_t(3, size=(12, 10))
        alarms += bool((sign_flip_max_t(values, seed=0).p_values <= alpha).any())
    assert alarms <= n * alpha + 4 * math.sqrt(n * alpha * (1 - alpha))


def test_p_values_of_clean_data_are_uniform_or_larger() -> None:
    rng = np.random.default_rng(7)
    p = np.array([sign_flip_max_t(rng.normal(size=(1, 10)), seed=0).p_values[0] for _ in range(800)])
    for level in (0.01, 0.1, 0.25, 0.5):
        assert (p <= level).mean() <= level + 4 * math.sqrt(level * (1 - level) / len(p))
    assert (p <= 0.5).mean() > 0.4, "a test whose p-values are all large has no power"


def test_a_constant_shift_is_found_at_the_smallest_p_value_that_the_units_allow() -> None:
    rng = np.random.default_rng(1)
    values = rng.normal(size=(40, 12)) * 1e-4
    values[17] += 1e-3

    result = sign_flip_max_t(values, seed=0)

    assert result.p_values.argmin() == 17
    assert result.p_values[17] == pytest.approx(2 / 2**12)
    assert result.smallest_p == pytest.approx(2 / 2**12)
    assert (np.delete(result.p_values, 17) > 0.05).all()


def test_many_units_use_random_flips_and_agree_with_the_exact_test() -> None:
    rng = np.random.default_rng(3)
    values = rng.normal(size=(5, 13)) + 0.4
    exact = sign_flip_max_t(values, seed=0).p_values
    padded = np.concatenate([values, np.zeros((5, 1))], axis=1)  # a unit of zeros changes the statistic little

    assert np.allclose(sign_flip_max_t(padded, seed=0).p_values, exact, atol=0.05)


def test_rows_of_zeros_are_no_evidence() -> None:
    assert sign_flip_max_t(np.zeros((3, 8)), seed=0).p_values.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("values", [np.ones((2, 1)), np.array([[1.0, np.nan, 2.0]])])
def test_too_few_units_or_values_that_are_not_finite_are_refused(values: np.ndarray) -> None:
    with pytest.raises(ValueError, match="two finite ones are needed"):
        sign_flip_max_t(values, seed=0)
