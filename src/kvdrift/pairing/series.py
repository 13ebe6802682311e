"""Figures of long cache reads, slot by slot: a read has most of its rows in common with the one before it.

Each decode step reads all that the step before it read, and a row more. What was measured of a row holds as long as
both sides have the bytes that they had, so that only the others are measured, and a read is put together from its rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.align import Pair
from kvdrift.pairing.kernels import (
    LONG,
    Bools,
    DriftFigures,
    Floats,
    as_floats,
    integers_of,
    is_safe,
    largest_ulp,
    norms_of,
)
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.sites import Site

# What is known of each row [slot]: of differing rows sums of products over the row, and the largest of its elements.
_COLUMNS = ("moved", "norm", "other", "product", "along", "total", "largest", "ulp", "drift", "same")
_AT = {name: index for index, name in enumerate(_COLUMNS)}
_SUMS = len(_COLUMNS[: _AT["largest"]])


class Hash(Protocol):
    """A hash in the making, of `hashlib`."""

    def copy(self) -> Hash: ...
    def update(self, data: memoryview, /) -> None: ...
    def digest(self) -> bytes: ...


class SlotFigures(NamedTuple):
    """The cached position whose row drifts most, how many rows differ in their bits, and how many of those are of
    tokens before the one that reads."""

    worst: int = -1
    n_bad: int = 0
    n_bad_past: int = 0


class _Largest(NamedTuple):
    """The largest distances of a read: every one that is at least the least of them. `is_all` says that all others are
    zero."""

    values: Floats
    is_all: bool

    def at(self, n_above: int) -> float | None:
        """Return the one that `n_above` - 1 others are not below; None where it is not among these."""
        if n_above > len(self.values):
            return 0.0 if self.is_all else None
        rank = len(self.values) - n_above
        return float(np.partition(self.values, rank)[rank])

    def beside(self, more: Floats) -> _Largest:
        """Return these where further distances were added."""
        least = 0.0 if self.is_all else float(self.values.min())
        more = more[(more > 0.0) & (more >= least)]
        return _Largest(np.concatenate([self.values, more]) if more.size else self.values, self.is_all)


class _Known(NamedTuple):
    """A read as it was measured: rows [slot, element] of both sides, and of each slot the columns [column, slot]."""

    prefill: Array
    decode: Array
    columns: Floats
    distances: _Largest
    hashes: tuple[Hash, Hash] | None


class LongRead(NamedTuple):
    """A long read that was measured; `digests` are the SHA-256 of both sides, where they were asked for."""

    figures: DriftFigures
    slots: SlotFigures
    digests: tuple[bytes, bytes] | None


@dataclass(slots=True)
class ReadSeries:
    """Measures the reads of one walk through two passes, in its order."""

    with_hashes: bool = False
    _known: dict[tuple[int | None, Site], _Known] = field(default_factory=dict)

    def measure(self, pairs: Sequence[Pair]) -> LongRead | None:
        """Return the figures of a long read that is alone in its batch, and those of its slots; None for other pairs,
        and where a value is not finite or a norm leaves the range that may be squared.

        Sums are those of the rows, added up: they may differ from those of `measure` by a rounding of float64.
        """
        pair, *others = pairs
        if others or pair.slots is None or pair.prefill.shape[1] <= LONG or pair.prefill.dtype != pair.decode.dtype:
            return None
        prefill, decode = (side.reshape(-1, pair.row_size) for side in (pair.prefill, pair.decode))
        before = self._known.pop((pair.layer, pair.site), None)
        held = _held(before, prefill, decode)
        columns = np.zeros((len(_COLUMNS), len(held)))
        if before is not None:
            n_held = min(len(held), len(before.prefill))
            columns[:, :n_held] = before.columns[:, :n_held]
        fresh = np.flatnonzero(~held)
        if not _measure_rows(prefill, decode, fresh, columns):
            return None
        n_above = _n_above(prefill.size)
        has_grown = before is not None and bool(held[: len(before.prefill)].all()) and len(held) >= len(before.prefill)
        distances, p99 = None, None
        if before is not None and has_grown:
            distances = before.distances.beside(_distances(prefill, decode, fresh, columns))
            p99 = distances.at(n_above)
        if distances is None or p99 is None:
            distances = _largest(_distances(prefill, decode, np.arange(len(held)), columns), n_above)
            p99 = distances.at(n_above)
            assert p99 is not None
        figures = _figures(columns, prefill.size, p99)
        if figures is None:
            return None
        hashes = _hashes(before if has_grown else None, prefill, decode) if self.with_hashes else None
        self._known[pair.layer, pair.site] = _Known(prefill, decode, columns, distances, hashes)
        slots = _slot_figures(columns, pair.slots, pair.positions[0], pair.row_size)
        return LongRead(figures, slots, None if hashes is None else (hashes[0].digest(), hashes[1].digest()))


def _hashes(before: _Known | None, prefill: Array, decode: Array) -> tuple[Hash, Hash]:
    """The hashes of both sides, carried on from those of the read before where this one has more rows behind it."""
    first, second = (hashlib.sha256(), hashlib.sha256()) if before is None or before.hashes is None else before.hashes
    start = 0 if before is None or before.hashes is None else len(before.prefill)
    found = first.copy(), second.copy()
    for known, side in zip(found, (prefill, decode), strict=True):
        if len(side) > start:
            known.update(np.ascontiguousarray(side[start:]).view(np.uint8).data)
    return found


def _held(before: _Known | None, prefill: Array, decode: Array) -> Bools:
    """Which rows [slot] have on both sides the bytes that the read before had there."""
    held = np.zeros(len(prefill), dtype=bool)
    if before is None or prefill.shape[1:] != before.prefill.shape[1:] or prefill.dtype != before.prefill.dtype:
        return held
    n = min(len(prefill), len(before.prefill))
    held[:n] = True
    for now, then in ((prefill, before.prefill), (decode, before.decode)):
        if now.__array_interface__["data"] != then.__array_interface__["data"]:
            held[:n] &= (integers_of(now[:n]) == integers_of(then[:n])).all(axis=1)
    return held


def _measure_rows(prefill: Array, decode: Array, fresh: NDArray[np.intp], columns: Floats) -> bool:
    """Fill in the columns of the rows `fresh`, of few enough of them at a time for the caches of a CPU; return whether
    all of their values are finite and can be squared."""
    step = max(1, LONG // prefill.shape[1])
    for start in range(0, len(fresh), step):
        at = fresh[start : start + step]
        first, second = _rows(prefill, at), _rows(decode, at)
        bits = integers_of(first), integers_of(second)
        n_same = np.add.reduce(bits[0] == bits[1], axis=1, dtype=np.int64)
        columns[:, at] = 0.0
        columns[_AT["same"], at] = n_same
        reference = as_floats(first)
        with np.errstate(over="ignore", invalid="ignore"):
            squares = np.einsum("ij,ij->i", reference, reference)
        columns[_AT["norm"], at] = columns[_AT["other"], at] = columns[_AT["product"], at] = squares
        if not np.isfinite(squares).all():
            return False
        if (apart := n_same < first.shape[1]).any():
            here = slice(None) if apart.all() else apart
            found = _of_differing(reference[here], as_floats(second[here]), squares[here])
            if found is None:
                return False
            columns[: _AT["ulp"], at[here]] = found[:-1]
            columns[_AT["drift"], at[here]] = found[-1]
            columns[_AT["ulp"], at[here]] = largest_ulp(bits[0][here], bits[1][here], None)
    return True


def _of_differing(reference: Floats, value: Floats, squares: Floats) -> Floats | None:
    """The columns up to the largest distance, and the drift, of rows that differ; None where one is not finite."""
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        difference = value - reference
        sides = ((difference, difference), (value, value), (reference, value), (difference, reference))
        moved, other, product, along = (np.einsum("ij,ij->i", *pair) for pair in sides)
        total = difference.sum(axis=1)
        if not np.isfinite([moved, other, product, along]).all():
            return None
        apart = norms_of(difference, moved)
        drift = np.where(apart == 0.0, 0.0, apart / norms_of(reference, squares))
        largest = np.abs(difference, out=difference).max(axis=1)
    return np.array([moved, squares, other, product, along, total, largest, drift])


def _rows(side: Array, at: NDArray[np.intp]) -> Array:
    """Rows of one side; not a copy where they follow upon one another."""
    return side[at[0] : at[-1] + 1] if at[-1] - at[0] + 1 == len(at) else side[at]


def _distances(prefill: Array, decode: Array, at: NDArray[np.intp], columns: Floats) -> Floats:
    """The distances of all elements of the rows `at` that differ, flat; those of the others are zero."""
    at = at[columns[_AT["same"], at] < prefill.shape[1]]
    if not len(at):
        return np.empty(0)
    difference = as_floats(_rows(decode, at)) - as_floats(_rows(prefill, at))
    return np.abs(difference, out=difference).ravel()


def _largest(distances: Floats, n_above: int) -> _Largest:
    """The largest of all distances, more than are asked for now: the next reads will ask for more."""
    n_kept = n_above + n_above // 4 + 64
    if len(distances) <= n_kept:
        return _Largest(distances[distances > 0.0], is_all=True)
    largest = np.partition(distances, len(distances) - n_kept)[-n_kept:]
    return _Largest(largest.copy(), is_all=False)  # of a view, all distances would stay in memory


def _n_above(n_elements: int) -> int:
    """How many of the largest elements reach down to the 99th percentile, as `measure` has it."""
    return n_elements - min(n_elements - 1, int(np.ceil(0.99 * n_elements)) - 1)


def _figures(columns: Floats, n_elements: int, p99: float) -> DriftFigures | None:
    """The figures of a whole read from those of its rows."""
    moved, norm, other, product, along, total = columns[:_SUMS].sum(axis=1)
    n_same = int(columns[_AT["same"]].sum())
    equal = n_same == n_elements
    if not equal and not (is_safe(np.array([moved, norm, other])) and norm * other > 0.0):
        return None
    moved, norm, other = np.sqrt([moved, norm, other])

    def one(value: float, *, if_equal: float = 0.0) -> Floats:
        return np.array([if_equal if equal else value], dtype=np.float64)

    with np.errstate(divide="ignore", invalid="ignore"):  # of equal rows of zeros
        return DriftFigures(
            equal=np.array([equal]),
            max_abs=one(columns[_AT["largest"]].max()),
            max_ulp=one(columns[_AT["ulp"]].max()),
            rel_l2=one(moved / norm),
            p99_abs=one(p99),
            cosine=one(float(np.clip(product / (norm * other), -1.0, 1.0)), if_equal=1.0),
            bias=one(total / n_elements / (norm / np.sqrt(n_elements))),
            n_nonfinite=np.zeros(1, dtype=np.int64),
            n_differ=np.array([n_elements - n_same], dtype=np.int64),
            gain=one(along / norm**2),
        )


def _slot_figures(columns: Floats, slots: Slots, position: int, row_size: int) -> SlotFigures:
    bad: NDArray[np.bool_] = columns[_AT["same"]] < row_size
    if not bad.any():
        return SlotFigures()
    past = bad & (slots < position)
    return SlotFigures(int(slots[int(np.argmax(columns[_AT["drift"]]))]), int(bad.sum()), int(past.sum()))


__all__ = ["Hash", "LongRead", "ReadSeries", "SlotFigures"]
