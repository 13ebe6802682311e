"""Metrics of pairs of vectors, one pass over the data, accumulated in float64.

Every function takes `prefill` and `decode` as [pair, element] in the dtype in which the engine computed them and
returns one figure a pair. Prefill is the reference: it never reads the cache under test. No epsilon enters a figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import AlignmentError
from kvdrift.trace.model import Array

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]

# Norms between this and its inverse are safe to square and to multiply in float64.
_SMALL = 1e-140

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
    if prefill.shape != decode.shape or prefill.ndim != 2 or prefill.shape[1] == 0:
        raise AlignmentError(f"shapes differ or are empty: prefill {prefill.shape}, decode {decode.shape}")
    if prefill.dtype != decode.dtype:
        raise AlignmentError(f"dtypes differ: prefill {prefill.dtype}, decode {decode.dtype}")
    equal = (_integers(prefill) == _integers(decode)).all(axis=1)
    if not equal.any():
        return _measure(prefill, decode, free_shift_of)
    # Most pairs of a clean run have the same bits, and there is nothing to compute for them.
    n_pairs = len(equal)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        nonfinite = (~np.isfinite(prefill)).sum(axis=1)
    figures = DriftFigures(
        equal=equal,
        max_abs=np.zeros(n_pairs),
        max_ulp=np.zeros(n_pairs),
        rel_l2=np.zeros(n_pairs),
        p99_abs=np.zeros(n_pairs),
        cosine=np.ones(n_pairs),
        bias=np.zeros(n_pairs),
        n_nonfinite=nonfinite,
        n_differ=np.zeros(n_pairs, dtype=np.int64),
        gain=np.zeros(n_pairs),
    )
    if not equal.all():
        differing = ~equal
        measured = _measure(prefill[differing], decode[differing], free_shift_of)
        for name in DriftFigures.__dataclass_fields__:
            getattr(figures, name)[differing] = getattr(measured, name)
    return figures


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


def _measure(prefill: Array, decode: Array, free_shift_of: int | None) -> DriftFigures:
    bits = _integers(prefill), _integers(decode)
    same = bits[0] == bits[1]
    equal = same.all(axis=1)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        reference, value = prefill.astype(np.float64), decode.astype(np.float64)
    finite = np.isfinite(reference) & np.isfinite(value)
    all_finite = bool(finite.all())
    if not all_finite:
        reference, value = np.where(finite, reference, 0.0), np.where(finite, value, 0.0)
    broken = np.zeros(len(equal), dtype=bool) if all_finite else (~finite & ~same).any(axis=1)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = value - reference
        if free_shift_of is not None:
            difference -= _shift(difference, finite, free_shift_of)
            value = reference + difference
        distance = np.abs(difference)
        moved, norm, other = _norm(difference), _norm(reference), _norm(value)
        rel_l2 = np.where(moved == 0.0, 0.0, moved / norm)
        cosine = np.where(
            (norm == 0.0) | (other == 0.0), np.where(norm == other, 1.0, 0.0), _cosine(reference, value, norm, other)
        )
        mean = difference.mean(axis=1)
        bias = np.where(mean == 0.0, 0.0, mean / (norm / np.sqrt(prefill.shape[1])))
        unit = np.divide(reference, norm[:, None], out=np.zeros_like(reference), where=norm[:, None] > 0.0)
        along = np.einsum("ij,ij->i", np.where(np.isfinite(difference), difference, 0.0), unit)
        gain = np.where(along == 0.0, 0.0, along / norm)
    rank = min(prefill.shape[1] - 1, int(np.ceil(0.99 * prefill.shape[1])) - 1)
    p99 = np.partition(distance, rank, axis=1)[:, rank]
    ulp = _ulp_distance(*bits)
    ulp = np.where(finite, ulp, 0.0) if not all_finite else ulp
    return DriftFigures(
        equal=equal,
        max_abs=np.where(broken, np.inf, distance.max(axis=1)),
        max_ulp=np.where(broken, np.inf, ulp.max(axis=1)),
        rel_l2=np.where(broken, np.inf, rel_l2),
        p99_abs=np.where(broken, np.inf, p99),
        cosine=np.where(broken, np.nan, np.clip(cosine, -1.0, 1.0)),
        bias=np.where(broken, np.nan, bias),
        n_nonfinite=(~finite).sum(axis=1),
        n_differ=(~same).sum(axis=1),
        gain=np.where(broken, np.nan, gain),
    )


def _shift(difference: Floats, finite: Bools, size: int) -> Floats:
    """The mean of each run of `size` elements, over the finite ones, repeated for all of them."""
    runs = difference.reshape(len(difference), -1, size), finite.reshape(len(difference), -1, size)
    count = np.maximum(runs[1].sum(axis=-1, keepdims=True), 1)
    return np.broadcast_to(runs[0].sum(axis=-1, keepdims=True) / count, runs[0].shape).reshape(difference.shape)


def hash_rows(values: Array) -> list[bytes]:
    """Return the SHA-256 of the bytes of each row of `values` [row, ...]."""
    rows = np.ascontiguousarray(values).reshape(len(values), -1).view(np.uint8)
    return [hashlib.sha256(row.data).digest() for row in rows]


def _norm(values: Floats) -> Floats:
    """The 2-norm of each row, also where the squares leave the range of float64."""
    norm = np.asarray(np.sqrt(np.einsum("ij,ij->i", values, values)))
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
        cosine[risky] = np.einsum("ij,ij->i", first, second) / (_norm(first) * _norm(second))
    return cosine


def _near_one(values: Floats) -> tuple[Floats, NDArray[np.int32]]:
    """Scale each row by the power of two that brings its largest element near 1; return the exponents too."""
    exponent = np.frexp(np.abs(values).max(axis=1))[1]
    return np.ldexp(values, -exponent[:, np.newaxis]), exponent


def _integers(values: Array) -> NDArray[np.signedinteger]:
    return np.ascontiguousarray(values).view(_INTEGER_OF_WIDTH[values.dtype.itemsize])


def _ulp_distance(prefill: NDArray[np.signedinteger], decode: NDArray[np.signedinteger]) -> Floats:
    """Count the representable numbers between two floats given as their bits.

    Floats of one sign are ordered as their bit patterns; the negative ones are mirrored so that the order runs on
    through zero, where both zeros fall together (Dawson, Comparing Floating Point Numbers, 2012).
    """
    lowest = np.iinfo(prefill.dtype).min
    ordered = [np.where(bits < 0, lowest - bits, bits) for bits in (prefill, decode)]
    # Subtracted as floats only when they are far apart: the difference of two int64 may not fit into one.
    near = np.abs(ordered[0].astype(np.float64) - ordered[1].astype(np.float64))
    if prefill.dtype.itemsize < 8:
        return near
    exact = (ordered[0] - ordered[1]).astype(np.float64)
    return np.where(near < 2.0**60, np.abs(exact), near)
