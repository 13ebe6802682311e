"""Metrics of pairs of vectors, one pass over the data, accumulated in float64.

Every function takes `prefill` and `decode` as [pair, element] in the dtype in which the engine computed them and
returns one figure a pair. Prefill is the reference: it never reads the cache under test. No epsilon enters a figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import AlignmentError
from kvdrift.trace.model import Array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Norms between this and its inverse are safe to square and to multiply in float64.
_SMALL = 1e-140

# Elements that are looked at together when the largest are searched for.
_BLOCK = 16

# Rows of more elements are measured this many at a time: in float64 they are half a megabyte.
LONG = 1 << 16

_BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# The bits of the exponent, which are all set in a NaN and an infinity.
_EXPONENT: dict[np.dtype[np.generic], np.signedinteger] = {
    _BFLOAT16: np.int16(0x7F80),
    np.dtype(np.float16): np.int16(0x7C00),
    np.dtype(np.float32): np.int32(0x7F800000),
    np.dtype(np.float64): np.int64(0x7FF0000000000000),
}

_INTEGER_OF_WIDTH: dict[int, type[np.signedinteger]] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}


@dataclass(frozen=True, slots=True)
class DriftFigures:
    """Figures of n pairs, each an array [n].

    A pair in which one side is not finite where the other is, or differs from it, has infinite max_abs, rel_l2 and
    p99_abs, and NaN cosine and bias: it is never averaged away. Non-finite values that are the same bits on both sides
    do not drift; n_nonfinite counts them too.

    Attributes:
        equal: the same bits (a NaN equals itself, -0.0 does not equal 0.0).
        max_abs: largest |decode - prefill|.
        max_ulp: largest distance in units in the last place of the dtype, counted along its representable numbers.
        rel_l2: |decode - prefill| / |prefill| in the 2-norm; 0 if both are zero, inf if only prefill is.
        p99_abs: 99th percentile of |decode - prefill|.
        cosine: of the two vectors; 1 if both are zero, 0 if one is.
        bias: signed mean of decode - prefill, over the root mean square of prefill.
        n_nonfinite: elements that are NaN or infinite on either side.
        n_differ: elements whose bits differ.
        gain: (decode - prefill)·prefill / prefill·prefill, the relative error of a common factor; NaN like cosine.
    """

    equal: Bools
    max_abs: Floats
    max_ulp: Floats
    rel_l2: Floats
    p99_abs: Floats
    cosine: Floats
    bias: Floats
    n_nonfinite: Ints
    n_differ: Ints
    gain: Floats


_KINDS: dict[str, type[np.generic]] = {
    field.name: {"Bools": np.bool_, "Floats": np.float64, "Ints": np.int64}[str(field.type)]
    for field in fields(DriftFigures)
}


def measure(prefill: Array, decode: Array, *, free_shift_of: int | None = None) -> DriftFigures:
    """Compare `prefill` and `decode`, both [pair, element].

    `free_shift_of` is for scores: each run of that many elements, the keys of one head, may be shifted by a constant of
    its own, which softmax does not see. The mean of the difference over the keys with finite scores is then taken out
    of it. What concerns bits (equal, max_ulp, n_differ) stays as it is.

    Raises:
        AlignmentError: shapes or dtypes differ, or there is nothing to compare.
    """
    _check(prefill, decode)
    equal = equal_rows(prefill, decode)
    if not equal.any():
        return _measure(prefill, decode, free_shift_of)
    # Most pairs of a clean run have the same bits, and there is nothing to compute for them.
    n_pairs = len(equal)
    figures = DriftFigures(
        equal=equal,
        max_abs=np.zeros(n_pairs),
        max_ulp=np.zeros(n_pairs),
        rel_l2=np.zeros(n_pairs),
        p99_abs=np.zeros(n_pairs),
        cosine=np.ones(n_pairs),
        bias=np.zeros(n_pairs),
        n_nonfinite=np.zeros(n_pairs, dtype=np.int64),
        n_differ=np.zeros(n_pairs, dtype=np.int64),
        gain=np.zeros(n_pairs),
    )
    figures.n_nonfinite[equal] = _count_nonfinite(prefill if equal.all() else prefill[equal])
    if not equal.all():
        differing = ~equal
        measured = _measure(prefill[differing], decode[differing], free_shift_of)
        for name in DriftFigures.__dataclass_fields__:
            getattr(figures, name)[differing] = getattr(measured, name)
    return figures


def relative_drifts(prefill: Array, decode: Array, *, free_shift_of: int | None = None) -> Floats:
    """Return rel_l2 of `measure` alone, to the bit.

    Raises:
        AlignmentError: as `measure`.
    """
    _check(prefill, decode)
    if prefill.shape[1] > LONG and free_shift_of is None:
        return _long_drifts(prefill, decode)
    reference, value = as_floats(prefill), as_floats(decode)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = value - reference
        squares = np.einsum("ij,ij->i", difference, difference)
        if not np.isfinite(squares).all():
            return measure(prefill, decode, free_shift_of=free_shift_of).rel_l2
        if free_shift_of is not None:
            difference -= _shift(difference, None, free_shift_of)
            squares = np.einsum("ij,ij->i", difference, difference)
        moved = norms_of(difference, squares)
        return np.where(moved == 0.0, 0.0, moved / norms_of(reference))


def _long_drifts(prefill: Array, decode: Array) -> Floats:
    """What `relative_drifts` returns of rows that are longer than a cache of a processor, a block of elements at a
    time."""
    squares = np.zeros((2, len(prefill)))
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, prefill.shape[1], LONG):
            here = slice(start, start + LONG)
            reference, value = as_floats(prefill[:, here]), as_floats(decode[:, here])
            for into, values in zip(squares, (value - reference, reference), strict=True):
                into += np.einsum("ij,ij->i", values, values)
    if not is_safe(squares) or not squares[1].all():
        return measure(prefill, decode).rel_l2
    moved, norm = np.sqrt(squares)
    return np.asarray(moved / norm)


def count_differing(prefill: Array, decode: Array) -> Ints:
    """Return n_differ of `measure` alone.

    Raises:
        AlignmentError: as `measure`.
    """
    _check(prefill, decode)
    return np.asarray(np.add.reduce(integers_of(prefill) != integers_of(decode), axis=1, dtype=np.int64))


class Compared(NamedTuple):
    """The arguments of `measure`."""

    prefill: Array
    decode: Array
    free_shift_of: int | None = None


def measure_all(compared: Sequence[Compared]) -> DriftFigures:
    """Return what `measure` returns for each, one behind the other, to the bit; all that has rows of one kind is
    measured in one go.

    It takes memory in proportion to all of them together.

    Raises:
        AlignmentError: as `measure`.
    """
    kinds: dict[tuple[object, ...], list[int]] = {}
    for index, (prefill, decode, shift) in enumerate(compared):
        kind = (prefill.shape[1:], prefill.dtype, decode.shape[1:], decode.dtype, len(prefill) - len(decode), shift)
        kinds.setdefault(kind, []).append(index)
    if len(kinds) == 1:
        return measure(
            np.concatenate([item.prefill for item in compared]),
            np.concatenate([item.decode for item in compared]),
            free_shift_of=compared[0].free_shift_of,
        )
    counts = np.array([len(item.prefill) for item in compared])
    starts = np.cumsum(counts) - counts
    whole = DriftFigures(**{name: np.empty(int(counts.sum()), kind) for name, kind in _KINDS.items()})
    for alike in kinds.values():
        figures = measure(
            np.concatenate([compared[index].prefill for index in alike]),
            np.concatenate([compared[index].decode for index in alike]),
            free_shift_of=compared[alike[0]].free_shift_of,
        )
        at = np.concatenate([np.arange(starts[index], starts[index] + counts[index]) for index in alike])
        for name in _KINDS:
            getattr(whole, name)[at] = getattr(figures, name)
    return whole


def _check(prefill: Array, decode: Array) -> None:
    if prefill.shape != decode.shape or prefill.ndim != 2 or prefill.shape[1] == 0:
        raise AlignmentError(f"shapes differ or are empty: prefill {prefill.shape}, decode {decode.shape}")
    if prefill.dtype != decode.dtype:
        raise AlignmentError(f"dtypes differ: prefill {prefill.dtype}, decode {decode.dtype}")


def _measure(prefill: Array, decode: Array, free_shift_of: int | None) -> DriftFigures:
    if prefill.shape[1] > LONG and free_shift_of is None:
        found = _measure_long(prefill, decode)
        if found is not None:
            return found
    bits = integers_of(prefill), integers_of(decode)
    same = bits[0] == bits[1]
    n_same = np.add.reduce(same, axis=1, dtype=np.int64)
    n_elements = prefill.shape[1]
    reference, value = as_floats(prefill), as_floats(decode)
    with np.errstate(over="ignore", invalid="ignore"):
        squares = [np.einsum("ij,ij->i", side, side) for side in (reference, value)]
    finite = None
    # What is not finite makes the sum of the squares so; a sum may also leave the range of float64 by itself.
    if not (np.isfinite(squares[0]).all() and np.isfinite(squares[1]).all()):
        finite = np.isfinite(reference) & np.isfinite(value)
        if finite.all():
            finite = None
        else:
            reference, value = np.where(finite, reference, 0.0), np.where(finite, value, 0.0)
            squares = [np.einsum("ij,ij->i", side, side) for side in (reference, value)]
    broken = np.zeros(len(same), dtype=bool) if finite is None else (~finite & ~same).any(axis=1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = value - reference
        if free_shift_of is not None:
            difference -= _shift(difference, finite, free_shift_of)
            value = reference + difference
            squares[1] = np.einsum("ij,ij->i", value, value)
        moved, norm, other = norms_of(difference), norms_of(reference, squares[0]), norms_of(value, squares[1])
        rel_l2 = np.where(moved == 0.0, 0.0, moved / norm)
        cosine = np.where(
            (norm == 0.0) | (other == 0.0), np.where(norm == other, 1.0, 0.0), _cosine(reference, value, norm, other)
        )
        mean = difference.mean(axis=1)
        bias = np.where(mean == 0.0, 0.0, mean / (norm / np.sqrt(n_elements)))
        along = _along(difference, reference, norm)
        gain = np.where(along == 0.0, 0.0, along / norm)
    distance = np.abs(difference, out=difference)
    return DriftFigures(
        equal=n_same == n_elements,
        max_abs=np.where(broken, np.inf, distance.max(axis=1)),
        max_ulp=np.where(broken, np.inf, largest_ulp(*bits, finite)),
        rel_l2=np.where(broken, np.inf, rel_l2),
        p99_abs=np.where(broken, np.inf, _p99(distance)),
        cosine=np.where(broken, np.nan, np.clip(cosine, -1.0, 1.0)),
        bias=np.where(broken, np.nan, bias),
        n_nonfinite=np.zeros(len(same), dtype=np.int64) if finite is None else (~finite).sum(axis=1),
        n_differ=n_elements - n_same,
        gain=np.where(broken, np.nan, gain),
    )


def _measure_long(prefill: Array, decode: Array) -> DriftFigures | None:
    """What `_measure` returns of rows that are longer than a cache of a processor, a block of elements at a time; None
    where something is not finite, or where a norm leaves the range that may be squared.

    Sums are those of the blocks, added up: they may differ from those of whole rows by a rounding of float64.
    """
    n_pairs, n_elements = prefill.shape
    distance = np.empty((n_pairs, n_elements))
    moved, norm, other, product, along, total = np.zeros((6, n_pairs))
    n_same, largest = np.zeros(n_pairs, dtype=np.int64), np.zeros(n_pairs)
    with np.errstate(over="ignore", invalid="ignore"):
        for start in range(0, n_elements, LONG):
            here = slice(start, start + LONG)
            bits = integers_of(prefill[:, here]), integers_of(decode[:, here])
            n_same += np.add.reduce(bits[0] == bits[1], axis=1, dtype=np.int64)
            reference, value = as_floats(prefill[:, here]), as_floats(decode[:, here])
            difference = value - reference
            sides = ((difference, difference), (reference, reference), (value, value), (reference, value))
            sums = (moved, norm, other, product, along)
            for into, (first, second) in zip(sums, (*sides, (difference, reference)), strict=True):
                into += np.einsum("ij,ij->i", first, second)
            total += difference.sum(axis=1)
            np.maximum(largest, largest_ulp(*bits, None), out=largest)
            np.abs(difference, out=distance[:, here])
    squares = np.array([moved, norm, other])
    if not is_safe(squares) or not (norm * other > 0.0).all():
        return None
    moved, norm, other = np.sqrt(squares)
    return DriftFigures(
        equal=n_same == n_elements,
        max_abs=distance.max(axis=1),
        max_ulp=largest,
        rel_l2=moved / norm,
        p99_abs=_p99(distance),
        cosine=np.clip(product / (norm * other), -1.0, 1.0),
        bias=total / n_elements / (norm / np.sqrt(n_elements)),
        n_nonfinite=np.zeros(n_pairs, dtype=np.int64),
        n_differ=n_elements - n_same,
        gain=along / norm**2,
    )


def is_safe(squares: Floats) -> bool:
    """Return whether sums of squares are zero or far enough from both ends of the range of float64; NaN is not."""
    return bool(((squares > _SMALL) & (squares < 1.0 / _SMALL) | (squares == 0.0)).all())


def _along(difference: Floats, reference: Floats, norm: Floats) -> Floats:
    """The part of each difference along its reference: difference·reference / |reference|."""
    if (norm > 0.0).all():
        unit = reference / norm[:, None]
    else:
        unit = np.divide(reference, norm[:, None], out=np.zeros_like(reference), where=norm[:, None] > 0.0)
    along = np.asarray(np.einsum("ij,ij->i", difference, unit))
    if not np.isfinite(along).all():  # a difference that left the range of float64
        along = np.asarray(np.einsum("ij,ij->i", np.where(np.isfinite(difference), difference, 0.0), unit))
    return along


def _p99(distance: Floats) -> Floats:
    """The 99th percentile of each row: the smallest of its elements that 99 % of them do not exceed."""
    n_elements = distance.shape[1]
    rank = min(n_elements - 1, int(np.ceil(0.99 * n_elements)) - 1)
    n_above = n_elements - rank  # how many of the largest elements reach down to the one wanted
    if n_above == 1:
        return np.asarray(distance.max(axis=1))
    n_blocks = n_elements // _BLOCK
    if n_blocks <= 2 * n_above:
        return np.partition(distance, rank, axis=1)[:, rank]
    # The largest elements lie in the blocks with the largest maxima, and in what no block holds.
    whole = distance[:, : n_blocks * _BLOCK].reshape(len(distance), _BLOCK, n_blocks)
    best = np.argpartition(whole.max(axis=1), n_blocks - n_above, axis=1)[:, n_blocks - n_above :]
    candidates = np.take_along_axis(whole, best[:, None, :], axis=2).reshape(len(distance), -1)
    candidates = np.concatenate([candidates, distance[:, n_blocks * _BLOCK :]], axis=1)
    rank = candidates.shape[1] - n_above
    return np.partition(candidates, rank, axis=1)[:, rank]


def _shift(difference: Floats, finite: Bools | None, size: int) -> Floats:
    """The mean of each run of `size` elements, over the finite ones (None: all), repeated for all of them."""
    runs = difference.reshape(len(difference), -1, size)
    count: int | Ints = size
    if finite is not None:
        count = np.maximum(finite.reshape(runs.shape).sum(axis=-1, keepdims=True), 1)
    return np.broadcast_to(runs.sum(axis=-1, keepdims=True) / count, runs.shape).reshape(difference.shape)


def hash_rows(values: Array) -> list[bytes]:
    """Return the SHA-256 of the bytes of each row of `values` [row, ...]."""
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    return [hashlib.sha256(row.data).digest() for row in rows]


def norms_of(values: Floats, squares: Floats | None = None) -> Floats:
    """Return the 2-norm of each row, also where the squares leave the range of float64.

    `squares` is their sum, where it is known.
    """
    norm = np.asarray(np.sqrt(np.einsum("ij,ij->i", values, values) if squares is None else squares))
    risky = ~((norm > _SMALL) & (norm < 1.0 / _SMALL))
    if risky.any():
        scaled, exponent = _near_one(values[risky])
        norm[risky] = np.ldexp(np.sqrt(np.einsum("ij,ij->i", scaled, scaled)), exponent)
    return norm


def _cosine(prefill: Floats, decode: Floats, norm: Floats, other: Floats) -> Floats:
    """The cosine of each pair of rows with these norms; undefined where a norm is zero."""
    product = norm * other
    cosine = np.asarray(np.einsum("ij,ij->i", prefill, decode) / product)
    risky = ~((product > _SMALL) & (product < 1.0 / _SMALL)) & (norm > 0.0) & (other > 0.0)
    if risky.any():
        first, second = _near_one(prefill[risky])[0], _near_one(decode[risky])[0]
        cosine[risky] = np.einsum("ij,ij->i", first, second) / (norms_of(first) * norms_of(second))
    return cosine


def _near_one(values: Floats) -> tuple[Floats, NDArray[np.int32]]:
    """Scale each row by the power of two that brings its largest element near 1; return the exponents too."""
    exponent = np.frexp(np.abs(values).max(axis=1))[1]
    return np.ldexp(values, -exponent[:, np.newaxis]), exponent


def integers_of(values: Array) -> NDArray[np.signedinteger]:
    """Return the bits of `values` as integers of their width."""
    return np.ascontiguousarray(values).view(_INTEGER_OF_WIDTH[values.dtype.itemsize])


def equal_rows(prefill: Array, decode: Array) -> Bools:
    """Return which rows [pair] of `prefill` and `decode` have the same bits (a NaN equals itself, -0.0 not 0.0)."""
    return np.asarray((integers_of(prefill) == integers_of(decode)).all(axis=1))


def _is_finite(bits: NDArray[np.signedinteger], values: Array) -> Bools:
    """Where `values` are neither NaN nor infinite, read off their `bits` where the dtype has IEEE's exponent."""
    exponent = _EXPONENT.get(values.dtype)
    if exponent is None:
        with np.errstate(invalid="ignore"):  # a signalling NaN
            return np.isfinite(values)
    return np.asarray((bits & exponent) != exponent)


def _count_nonfinite(values: Array) -> Ints:
    finite = _is_finite(integers_of(values), values)
    if finite.all():
        return np.zeros(len(values), dtype=np.int64)
    return np.asarray((~finite).sum(axis=1))


def as_floats(values: Array) -> Floats:
    """Return `values` in float64, which holds them exactly; the same array if they are."""
    if values.dtype == _BFLOAT16:  # the upper half of a float32
        values = (np.ascontiguousarray(values).view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return values.astype(np.float64, copy=False)


def largest_ulp(prefill: NDArray[np.signedinteger], decode: NDArray[np.signedinteger], finite: Bools | None) -> Floats:
    """Count the representable numbers between two floats given as their bits, and return the most of each row, among
    those where `finite` (None: all).

    Floats of one sign are ordered as their bit patterns; the negative ones are mirrored so that the order runs on
    through zero, where both zeros fall together (Dawson, Comparing Floating Point Numbers, 2012).
    """
    # Of one sign the patterns are as far apart as the floats, and their difference cannot leave the range.
    apart = np.abs(prefill - decode)
    flipped = (prefill ^ decode) < 0
    unsigned = apart.view(f"u{prefill.dtype.itemsize}")
    if flipped.any():  # what lies between two signs are both magnitudes, as a number without sign
        magnitude = np.iinfo(prefill.dtype).max
        apart[flipped] = (prefill[flipped] & magnitude) + (decode[flipped] & magnitude)
    if finite is not None:
        unsigned = np.where(finite, unsigned, unsigned.dtype.type(0))
    largest = np.asarray(unsigned.max(axis=1).astype(np.float64))
    far = largest >= 2.0**60
    if far.any():
        sides = _ordered(prefill[far]), _ordered(decode[far])
        largest[far] = _far_ulp(*sides, None if finite is None else finite[far])
    return largest


def _ordered(bits: NDArray[np.signedinteger]) -> NDArray[np.signedinteger]:
    """The bits of floats as integers in the order of the floats."""
    sign = bits >> (8 * bits.dtype.itemsize - 1)  # -1 or 0
    ordered = bits & np.iinfo(bits.dtype).max
    ordered ^= sign
    ordered -= sign  # the magnitude, negated where the sign is set
    return ordered


def _far_ulp(first: NDArray[np.signedinteger], second: NDArray[np.signedinteger], finite: Bools | None) -> Floats:
    """The largest distance of rows in which two numbers are so far apart that float64 rounds it."""
    near = np.abs(first.astype(np.float64) - second.astype(np.float64))
    exact = (first - second).astype(np.float64)
    found = np.where(near < 2.0**60, np.abs(exact), near)
    return np.asarray((found if finite is None else np.where(finite, found, 0.0)).max(axis=1))
