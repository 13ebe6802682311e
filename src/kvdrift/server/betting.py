"""Evidence that may be looked at after every unit: betting on signs. Numbers in, numbers out.

Of each unit it is known whether it lies above or below a bound. Under the hypothesis to be refuted, a unit lies above
with a chance of at most one half, whatever came before. Somebody who bets the share `b` of a capital of 1 on "above",
at even odds, then owns prod(1 + b s), s = +1 above and -1 below: a non-negative supermartingale. A mean of such
capitals over some shares is one as well. By Ville's inequality it ever reaches 1/alpha with a chance of at most alpha,
so the audit may stop as soon as it does. (V. Vovk and R. Wang, "E-values: calibration, combination and applications",
2021; I. Waudby-Smith and A. Ramdas, "Estimating means of bounded random variables by betting", 2024, whose capital
process this is for two outcomes and a mean of 1/2.)
"""

from __future__ import annotations

from collections.abc import Sequence

# Shares that are bet, with the part of the capital that each has: all of it, which gains most while no unit
# contradicts, and two that survive contradictions. Twelve units without one reach 2341, ten 593.
SHARES = ((1.0, 0.4), (0.9, 0.3), (0.5, 0.3))


def capital(above: Sequence[bool]) -> float:
    """Return the capital after betting on "above" at every unit, 1 before the first one.

    >>> capital([]), round(capital([True] * 12)), capital([False] * 12) < 0.01
    (1.0, 2341, True)
    """
    n_above = sum(above)
    n_below = len(above) - n_above
    # Beyond 900 units above, more of them would leave the range of a float, and change nothing.
    return float(sum(part * (1.0 + b) ** min(n_above, 900) * (1.0 - b) ** n_below for b, part in SHARES))


def fewest_units(capital_wanted: float) -> int:
    """Return how many units, all of them above, reach a capital.

    >>> fewest_units(2000.0), fewest_units(1000.0)
    (12, 11)
    """
    n = 0
    while capital([True] * n) < capital_wanted:
        n += 1
    return n
