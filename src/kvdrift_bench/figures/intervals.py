"""How sure a share of n trials is: the exact binomial interval of Clopper and Pearson (1934)."""

from __future__ import annotations


def exact_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the true share with at least this confidence; (0, 1) if nothing was tried.

    >>> low, high = exact_interval(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)

    Raises:
        ValueError: the counts are not counts, or the confidence does not lie between 0 and 1.
    """
    from scipy.stats import binomtest  # takes longer to import than all of the benchmark's commands

    if (hits, trials) == (0, 0):
        return 0.0, 1.0
    interval = binomtest(hits, trials).proportion_ci(confidence, method="exact")
    return float(interval.low), float(interval.high)


__all__ = ["exact_interval"]
