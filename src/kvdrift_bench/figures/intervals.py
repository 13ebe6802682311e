"""How sure a share of n trials is: the exact binomial interval of Clopper and Pearson (1934)."""

from __future__ import annotations

import math
from collections.abc import Callable

_HALVINGS = 100


def exact_interval(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the interval that holds the true share with at least this confidence; (0, 1) if nothing was tried.

    >>> low, high = exact_interval(0, 100)
    >>> low, round(high, 4)
    (0.0, 0.0362)

    Raises:
        ValueError: the counts are no counts.
    """
    if not 0 <= hits <= trials or not 0.0 < confidence < 1.0:
        raise ValueError(f"{hits} hits in {trials} trials at confidence {confidence}")
    tail = (1.0 - confidence) / 2.0
    low = _root(lambda p: 1.0 - _at_most(hits - 1, trials, p) - tail) if hits else 0.0
    high = _root(lambda p: tail - _at_most(hits, trials, p)) if hits < trials else 1.0
    return low, high


def _root(rising: Callable[[float], float]) -> float:
    """Where a rising function of a share crosses zero."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2.0
        low, high = (middle, high) if rising(middle) < 0.0 else (low, middle)
    return (low + high) / 2.0


def _at_most(hits: int, trials: int, share: float) -> float:
    """Return the probability of at most `hits` in `trials`."""
    if share <= 0.0:
        return 1.0
    if share >= 1.0:
        return 1.0 if hits >= trials else 0.0
    logs = [
        math.lgamma(trials + 1)
        - math.lgamma(k + 1)
        - math.lgamma(trials - k + 1)
        + k * math.log(share)
        + (trials - k) * math.log1p(-share)
        for k in range(hits + 1)
    ]
    return min(1.0, math.fsum(math.exp(value) for value in logs))
