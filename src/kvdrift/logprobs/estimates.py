"""Estimates over tokens whose unit is the sequence: tokens of one sequence are not independent. Numbers in and out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from kvdrift.instruments.student import chance_of_t
from kvdrift.logprobs.dump import Bools, Floats, Ints


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over tokens with its interval, all in one unit; NaN where it cannot be computed.

    `error` is the standard error, with the sequence as the unit; `low` and `high` hold the interval of `level`.
    """

    value: float
    low: float
    high: float
    error: float
    level: float
    n_sequences: int


@dataclass(frozen=True, slots=True)
class Divergences:
    """K1, K3 and chi-square of B from A in nats, and the mean of p/q, over tokens that were sampled from A.

    With q the probability by A and p that by B, K1 is the mean of log q/p, K3 of p/q - 1 - log p/q, chi-square of
    (p/q - 1)^2 (J. Schulman, "Approximating KL divergence", 2020). The mean of p/q is 1, whatever B is, if the tokens
    were sampled from the probabilities that A reports.
    """

    k1: Estimate
    k3: Estimate
    chi2: Estimate
    ratio: Estimate


def divergences(d: Floats, sequence: Ints, *, level: float) -> Divergences:
    """Estimate divergences from `d` [token], the logprob of B less that of A in nats, by sequences [token].

    A NaN or an infinite difference makes the estimates NaN.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        excess = np.expm1(d)
        return Divergences(
            mean_over_sequences(-d, sequence, level=level),
            mean_over_sequences(excess - d, sequence, level=level),
            mean_over_sequences(excess**2, sequence, level=level),
            mean_over_sequences(excess + 1.0, sequence, level=level),
        )


def mean_over_sequences(values: Floats, sequence: Ints, *, level: float) -> Estimate:
    """Return the mean of `values` [token] with Student's interval, the unit being the sequence.

    It is a ratio of sums over sequences, whose variance is that of the linearised ratio (Cochran, Sampling Techniques,
    1977, 6.4), with one degree of freedom less than sequences. A single sequence has no interval, so it is NaN.
    """
    if not values.size or not np.isfinite(values).all():
        return Estimate(math.nan, math.nan, math.nan, math.nan, level, 0)
    sums = np.bincount(sequence, weights=values)
    counts = np.bincount(sequence)
    used = counts > 0
    sums, counts = sums[used], counts[used]
    n = int(used.sum())
    value = float(sums.sum() / counts.sum())
    if n < 2:
        return Estimate(value, math.nan, math.nan, math.nan, level, n)
    residual = (sums - value * counts) / counts.mean()
    error = float(np.sqrt((residual**2).sum() / (n - 1) / n))
    reach = error * t_quantile(1.0 - level, n - 1)
    return Estimate(value, value - reach, value + reach, error, level, n)


def t_quantile(alpha: float, n_free: int) -> float:
    """Return the t that |T| reaches with probability `alpha` at `n_free` degrees of freedom.

    >>> round(t_quantile(0.05, 10), 3)
    2.228
    """
    low, high = 0.0, 1.0
    while chance_of_t(high, n_free) > alpha and high < 1e9:
        high *= 2.0
    for _ in range(60):
        middle = 0.5 * (low + high)
        low, high = (middle, high) if chance_of_t(middle, n_free) > alpha else (low, middle)
    return high


def mean_square_limit(alpha: float, n: Floats) -> Floats:
    """Return what the mean of `n` squares of standard normals exceeds with probability `alpha`, elementwise.

    Wilson and Hilferty's cube (1931), which is within 1 % for n of 3 and more; `n` may be a fraction.

    >>> bool(abs(mean_square_limit(0.05, np.array([10.0]))[0] - 1.8307) < 0.01)
    True
    """
    z = NormalDist().inv_cdf(1.0 - alpha)
    spread = 2.0 / (9.0 * np.maximum(n, 1.0))
    return np.asarray((1.0 - spread + z * np.sqrt(spread)) ** 3)


def rms_by_sequence(z: Floats, sequence: Ints, n_sequences: int, keep: Bools | None = None) -> tuple[Floats, Ints]:
    """Return the rms of `z` in each sequence and the tokens that it is over; NaN where there is none."""
    chosen = np.ones(z.shape, dtype=bool) if keep is None else keep
    counts = np.bincount(sequence[chosen], minlength=n_sequences)
    sums = np.bincount(sequence[chosen], weights=z[chosen] ** 2, minlength=n_sequences)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.sqrt(sums / counts), counts.astype(np.int64)
