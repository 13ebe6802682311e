"""Errors of computed rows against what they are in exact arithmetic on the same operands, and what a pass may err by.

A right kernel rounds its result once, by at most u |y|. It may also round what it adds up: a kernel that splits a sum
rounds partial sums, and one that rounds its factors, such as probabilities, rounds every term. Both err as a sum of
roundings of the terms does, by about u times the root of the sum of their squares, the *spread*, whatever cancels in
the end. So every error is measured in units of

    a = u sqrt(y^2 + spread^2)

of its element: over a row and over blocks of a row in the 2-norm, and element by element. One rounding is at most 1 of
it.

The noise is what the other pass errs by at the same place, against the same reference: its largest over all (prompt,
position) units. A pass is beyond noise where it errs by more than `_TIMES` as much and by more than `LEAST`, which is
what a right kernel may do that rounds where the other's does not: by as much err 16 partial sums that are kept in the
native dtype and added one after the other. No chance enters, so no p-value is claimed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.kernels import as_floats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

# Elements of a block: a head, or as many elements as one.
BLOCK = 64
_TIMES = 2.0


class Sizes(NamedTuple):
    """An error of a row, of the worst block of it, and of its worst element, each over its allowance."""

    row: float
    block: float
    element: float

    @property
    def worst(self) -> float:
        """The largest of the three."""
        return max(self)

    def over(self, other: Sizes) -> Sizes:
        """Return each as a multiple of another one's."""
        return Sizes(*(mine / theirs for mine, theirs in zip(self, other, strict=True)))


# What a right kernel may err by, whatever prefill's does.
LEAST = Sizes(1.25, 1.75, 8.0)


@dataclass(frozen=True, slots=True)
class RowErrors:
    """The errors of some rows.

    Attributes:
        row, block, element: [row], as in `Sizes`.
        relative: [row], the allowance of a row over its size, in the 2-norm: what an error of 1 is of the row. Infinite
            where the row is zero.
        worst: [row], index of the worst element.
    """

    row: Floats
    block: Floats
    element: Floats
    relative: Floats
    worst: Ints

    def sizes(self, index: int) -> Sizes:
        """Return the errors of one row."""
        return Sizes(float(self.row[index]), float(self.block[index]), float(self.element[index]))


def measure_errors(
    values: NDArray[np.generic], reference: Floats, spread: Floats, dtype: str, unit: float, block: int = BLOCK
) -> RowErrors:
    """Measure `values` [row, element] against their exact `reference`.

    An element whose reference is NaN, infinite, or beyond the largest number of `dtype` says nothing and is left out. A
    NaN or an infinity in its place of a number is an infinite error.

    Args:
        values: as they were computed.
        reference: [row, element], exact.
        spread: [row, element], root of the sum of the squared terms.
        dtype: the half dtype that the values are rounded to.
        unit: its unit roundoff.
        block: elements of a block.
    """
    info = ml_dtypes.finfo(dtype)  # type: ignore[no-untyped-call]
    computed = as_floats(values)
    with np.errstate(invalid="ignore", over="ignore"):
        # NaN and infinity are below no number.
        is_told = np.abs(reference) < float(info.max) * (1.0 - unit)
        is_told &= np.isfinite(spread)
        error = computed - reference
        np.abs(error, out=error)
        if not np.isfinite(computed).all():
            error[~np.isfinite(computed)] = np.inf
    exact = reference
    if not is_told.all():
        error[~is_told] = 0.0
        exact, spread = np.where(is_told, reference, 0.0), np.where(is_told, spread, 0.0)
    allowed = np.hypot(exact, spread)
    allowed *= unit
    allowed += 0.5 * float(info.smallest_subnormal)
    ratios = error / allowed
    starts = np.arange(0, values.shape[1], block)
    worst = ratios.argmax(axis=1)
    errors, squares = np.square(error, out=error), np.square(allowed, out=allowed)
    blocks = np.add.reduceat(errors, starts, axis=1) / np.add.reduceat(squares, starts, axis=1)
    size = np.sqrt(np.sum(exact**2, axis=1))
    norm = np.sqrt(np.sum(squares, axis=1))
    return RowErrors(
        row=np.sqrt(np.sum(errors, axis=1)) / norm,
        block=np.sqrt(blocks.max(axis=1)),
        element=np.take_along_axis(ratios, worst[:, np.newaxis], axis=1)[:, 0],
        relative=np.divide(norm, size, out=np.full(len(size), np.inf), where=size > 0.0),
        worst=worst,
    )


def bound_from(noise: Sequence[Sizes]) -> Sizes:
    """Return what a pass may err by where the other one errs by `noise` in its units; infinite errors are no noise."""
    finite = [each for each in noise if np.isfinite(each).all()]
    largest = [max((each[i] for each in finite), default=0.0) for i in range(3)]
    return Sizes(*(max(_TIMES * size, least) for size, least in zip(largest, LEAST, strict=True)))


def promised(bound: Sizes, relative: float) -> float:
    """Return the relative error of a row, of any shape, that is beyond `bound` for sure, by what an error of 1 is.

    An error of one shape may fall on one element or spread over all, and the row holds them all.
    """
    return bound.row * relative
