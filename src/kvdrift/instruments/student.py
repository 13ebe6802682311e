"""Student's t in closed form, for whole degrees of freedom."""

from __future__ import annotations

import math


def chance_of_t(t: float, n_free: int) -> float:
    """Return the probability that |T| reaches `t` with `n_free` degrees of freedom (Abramowitz & Stegun 1964, 26.7.3).

    An infinite `t` has none, NaN is 1: it is not sure of anything. Below about 1e-15 the sum cancels, and 0 may come.

    >>> round(chance_of_t(12.706, 1), 4), round(chance_of_t(2.201, 11), 4)
    (0.05, 0.05)

    Raises:
        ValueError: fewer than one degree of freedom.
    """
    if n_free < 1:
        raise ValueError(f"{n_free} degrees of freedom; at least one is needed")
    if math.isnan(t):
        return 1.0
    angle = math.atan(t / math.sqrt(n_free))
    cosine = math.cos(angle)
    term = cosine if n_free % 2 else 1.0
    total = 0.0
    for k in range(1 + n_free % 2, n_free, 2):
        total += term
        term *= cosine**2 * k / (k + 1)
    if n_free % 2:
        inside = 2.0 / math.pi * (angle + math.sin(angle) * total)
    else:
        inside = math.sin(angle) * total
    return max(0.0, 1.0 - inside)
