"""Norms whose statistic one pass computes in the native dtype: every row has a factor of its own.

The factor is of no preferred sign and below one rounding of each element: it is made of the roundings of the mean
square and of its root. In a right norm those are of float32, and the mean relative difference of a row is that of its
elements' roundings, which falls with their number. Elements of the same input are rounded alike, and count once.

Blind to: places where fewer than eight different rows were seen; a statistic that both passes keep in the native dtype.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from kvdrift.instruments.rowwise import DEVIATIONS, NORM_EPSILON, OF_A_NORM, ROUNDED, RowProjection, RowTable
from kvdrift.vocabulary.address import Address, Place

# The typical factor of a row, in roundoffs, that may be rounding whatever the number of elements, and the fewest rows
# that show how factors are spread.
_LEAST_SPREAD = 0.25
_FEWEST_ROWS = 8
_LEFT_OUT = 2


@dataclass(frozen=True, slots=True)
class NormFactors:
    """Norms whose rows are off by a factor each: where they begin, the first row there, the typical (rms) factor, and
    what a right norm may make of it. `explained` is the share of the squared difference that the factors are."""

    address: Address
    size: float
    bound: float
    explained: float


def norm_factors(table: RowTable, fresh: Collection[Address], unit: float) -> NormFactors | None:
    """Return where norms begin whose rows differ by factors that rounding of elements cannot make; None if none do.

    Rows with equal inputs take part, equal rows once. What all rows of a place have in common is taken off first:
    kernels that truncate multiply all rows by it. Under H0 the mean of n elements' relative differences has at most the
    variance of four roundings over n; the sum of squares over rows is compared with a chi-square of as many degrees of
    freedom (Wilson and Hilferty 1931), six deviations out. The two rows that are furthest off are left out: where an
    engine itself keeps the statistic in the native dtype, another order of its sum may turn one rounding of it, and
    with that a whole row, once in thousands of rows. Typical factors below `_LEAST_SPREAD` roundoffs are never a fault:
    a factor near a power of two has all elements of a row rounded to the same side.

    Args:
        table: the rows.
        fresh: the addresses at which both passes have the same inputs.
        unit: roundoff of the native dtype.
    """
    known = set(fresh)
    rows: dict[Place, dict[int, RowProjection]] = defaultdict(dict)
    for row in table.rows:
        if row.cause == NORM_EPSILON and row.address in known and row.distinct > 1.0:
            rows[row.address.place].setdefault(row.source, row)
    spreads = {
        place: _spread(list(found.values()), unit)
        for place, found in sorted(rows.items(), key=lambda item: item[0].forward_rank)
        if len(found) >= _LEFT_OUT + 2
    }
    sure = {
        place: found
        for place, found in spreads.items()
        if len(rows[place]) >= _FEWEST_ROWS
        and found.variance > max(found.null * _tail(found.free, DEVIATIONS), (_LEAST_SPREAD * unit) ** 2)
    }
    if not sure:
        return None
    # Where one place is sure, the earlier ones that show it less clearly are the same fault.
    begins = next(
        p for p, found in spreads.items() if p in sure or found.variance > found.null * _tail(found.free, 3.0)
    )
    here, found = list(rows[begins].values()), max(sure.values(), key=lambda item: item.variance)
    moved = sum(row.counted / row.lever**2 * _factor(row) ** 2 for row in here)
    return NormFactors(
        max(here, key=lambda row: (abs(_factor(row)), row.address)).address,
        math.sqrt(found.variance),
        math.sqrt(max(found.null * _tail(found.free, DEVIATIONS), (_LEAST_SPREAD * unit) ** 2)),
        min(1.0, moved / (sum(row.error for row in here) or math.inf)),
    )


@dataclass(frozen=True, slots=True)
class _Spread:
    """The variance of the factors of rows at a place, what rounding makes of it at most, and degrees of freedom."""

    variance: float
    null: float
    free: int


def _factor(row: RowProjection) -> float:
    """The mean relative difference of a norm's row."""
    return row.along / row.lever / (row.counted / row.lever**2)


def _spread(rows: Sequence[RowProjection], unit: float) -> _Spread:
    factors = np.array([_factor(row) for row in rows])
    kept = factors[np.argsort(np.abs(factors - np.median(factors)), kind="stable")[:-_LEFT_OUT]]
    null = unit**2 * OF_A_NORM * ROUNDED * float(np.mean([1.0 / row.distinct for row in rows]))
    return _Spread(float(kept.var(ddof=1)), null, len(kept) - 1)


def _tail(free: int, deviations: float) -> float:
    """What a mean square of `free` normal deviates may be, so many deviations out."""
    error = 2.0 / (9.0 * free)
    return float((1.0 - error + deviations * math.sqrt(error)) ** 3)
