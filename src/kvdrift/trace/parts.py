"""Records that hold a part of a tensor, as the ranks of an engine that splits its layers have them: joined on reading.

Heads or columns are laid side by side. Parts that only name a rank are addends: what a collective sums up. Where the
sum was recorded too it is checked against them, and the rank is named that explains the difference.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import TraceError
from kvdrift.trace.manifest import RecordEntry
from kvdrift.trace.model import CacheRecord, RowRecord, Trace
from kvdrift.trace.ranks import Axis, RankPart, SumCheck
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, Site

Array = NDArray[np.generic]
# Share of a wrong sum that the part of one rank must explain to be called its cause.
_EXPLAINS = 0.5
# Roundings of a sum of n parts are n - 1 and one of each part; twice as many are allowed.
_MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Piece:
    """A record as it was read, before it is joined: `values` [position, ...], or [slot, head, dim] of a cache."""

    layer: int | None
    site: Site
    positions: tuple[int, ...]
    part: RankPart
    values: Array
    slots: NDArray[np.int64] | None = None

    @property
    def where(self) -> str:
        """The record in words."""
        layer = "" if self.layer is None else f" of layer {self.layer}"
        return f"{self.site}{layer} at the positions {list(self.positions)}"


def part_of(record: RecordEntry) -> RankPart | None:
    """Return what a record holds of its tensor, None if that is all of it.

    Raises:
        ValueError: it names both heads and columns, or an empty span.
    """
    if record.heads is None and record.columns is None and record.rank is None:  # nearly every record
        return None
    named: dict[Axis, Sequence[int] | None] = {"heads": record.heads, "columns": record.columns}
    spans = {axis: span for axis, span in named.items() if span is not None}
    if len(spans) > 1:
        raise ValueError(f"{record.tensor!r} names both heads and columns; name one of them")
    for axis, span in spans.items():
        if len(span) != 2 or not 0 <= span[0] < span[1]:
            raise ValueError(f"{record.tensor!r} has the {axis} {list(span)}; write [first, stop] with first < stop")
        return RankPart(record.rank, axis, (span[0], span[1]))
    return None if record.rank is None else RankPart(record.rank, "sum", None)


def join(pieces: Iterable[Piece], trace: Trace, path: object) -> None:
    """Add the joined pieces to a trace, and what their check showed.

    Raises:
        TraceError: a part is missing, is there twice, or does not fit the others.
    """
    groups: dict[tuple[int | None, Site, tuple[int, ...]], list[Piece]] = defaultdict(list)
    for piece in pieces:
        groups[piece.layer, piece.site, piece.positions].append(piece)
    of_layer: dict[int | None, set[int]] = defaultdict(set)
    for (layer, *_), found in groups.items():
        of_layer[layer] |= {piece.part.rank for piece in found if piece.part.rank is not None}
    for (layer, *_), found in groups.items():
        try:
            _join(found, trace)
            _check_ranks(found, of_layer[layer])
        except ValueError as error:
            raise TraceError(f"the trace {path} holds parts of {found[0].where} that do not join: {error}") from error


def _check_ranks(found: Sequence[Piece], of_layer: set[int]) -> None:
    """The last rank's part may be missing on both sides, and nothing else would show it: how far heads or columns reach
    is not known. So every rank of a layer has a part of everything that is split there."""
    ranks = {piece.part.rank for piece in found if piece.part.rank is not None}
    if ranks and (missing := sorted(of_layer - ranks)):
        raise ValueError(
            f"rank {missing[0]} has a part of other sites of this layer and none of this one; what a rank holds as a "
            "whole is recorded without rank and heads"
        )


def _join(found: list[Piece], trace: Trace) -> None:
    kinds = {piece.part.axis for piece in found}
    if len(kinds) > 1:
        raise ValueError(f"some name {', some name '.join(sorted(kinds))}; name the same of all")
    (kind,) = kinds
    trace.parts[found[0].layer, found[0].site] = tuple(piece.part for piece in found)
    if kind == "sum":
        _add_up(found, trace)
        return
    ordered = sorted(found, key=lambda piece: piece.part.span or (0, 0))
    kept: list[Piece] = []
    for piece in ordered:
        if kept and piece.part.span == kept[-1].part.span:
            _check_copy(kept[-1], piece, trace)
        else:
            kept.append(piece)
    axis = -1 if kind == "columns" else 1
    reached = 0
    for piece in kept:
        first, stop = piece.part.span or (0, 0)
        if first != reached:
            raise ValueError(f"{kind} {reached}-{first - 1} are missing" if first > reached else f"{kind} overlap")
        if piece.values.ndim < 2 or piece.values.shape[axis] != stop - first:
            raise ValueError(f"{piece.part.name} has the shape {list(piece.values.shape)}")
        reached = stop
    if len({piece.values.dtype for piece in kept}) > 1:
        raise ValueError("the parts are of different dtypes")
    _put(kept[0], np.concatenate([piece.values for piece in kept], axis=axis), kept, trace)


def _put(first: Piece, values: Array, kept: Sequence[Piece], trace: Trace) -> None:
    known: Sequence[RowRecord | CacheRecord] = trace.cache if first.site in CACHE_SITES else trace.rows
    if any((r.layer, r.site) == (first.layer, first.site) and {*r.positions} & {*first.positions} for r in known):
        raise ValueError("the whole was recorded too; leave out the one or the other")
    if first.site not in CACHE_SITES:
        trace.rows.append(RowRecord(first.layer, first.site, first.positions, values, first.slots))
        return
    slots = np.arange(len(values)) if first.slots is None else first.slots
    if any(piece.slots is not None and not np.array_equal(piece.slots, slots) for piece in kept):
        raise ValueError("the ranks hold different slots; parts of a cache are heads of the same slots")
    if first.layer is None or values.ndim != 3 or len(slots) != len(values) or len(first.positions) != 1:
        raise ValueError(f"together they are {list(values.shape)}; a cache read is [slot, head, dim] at one position")
    trace.cache.append(CacheRecord(first.layer, first.site, first.positions, slots, np.arange(len(slots)), values))


def _check_copy(first: Piece, second: Piece, trace: Trace) -> None:
    """Two ranks that hold the same part must hold the same bits."""
    if first.part.rank == second.part.rank:
        raise ValueError(f"{first.part.name} is there twice")
    if first.values.shape != second.values.shape or first.values.tobytes() != second.values.tobytes():
        guilty = f"{second.part.name} differs from its copy on {first.part.name}"
        trace.sums += [SumCheck(first.layer, first.site, p, np.inf, guilty) for p in first.positions]


def _add_up(found: list[Piece], trace: Trace) -> None:
    """Check a recorded sum against its addends, or make the sum of them."""
    ranks = [piece.part.rank for piece in found]
    if len(set(ranks)) < len(ranks):
        raise ValueError(
            f"rank {next(r for r in ranks if ranks.count(r) > 1)} is there twice; heads or columns tell apart"
        )
    if len({piece.values.shape for piece in found}) > 1:
        raise ValueError("addends of a sum must have one shape; name heads or columns of parts that stand side by side")
    first = found[0]
    if first.site in CACHE_SITES:
        raise ValueError("rows of a cache are no sum; name the heads that each rank holds")
    addends = np.stack([piece.values.astype(np.float64) for piece in found])
    trace.addends[first.layer, first.site] = {
        **trace.addends.get((first.layer, first.site), {}),
        **{(piece.part.name, p): piece.values[i] for piece in found for i, p in enumerate(first.positions)},
    }
    totals = {
        position: record.values[index]
        for record in trace.rows
        if (record.layer, record.site) == (first.layer, first.site)
        for index, position in enumerate(record.positions)
    }
    if not totals.keys() & set(first.positions):
        _put(first, addends.sum(axis=0).astype(first.values.dtype), found, trace)
        return
    for index, position in enumerate(first.positions):
        if position not in totals:
            raise ValueError(f"the sum at position {position} is missing, and others are there")
        trace.sums.append(_checked(found, addends[:, index], totals[position], position, trace.rung))


def _checked(found: Sequence[Piece], addends: NDArray[np.float64], total: Array, position: int, rung: str) -> SumCheck:
    """Hold a sum against its addends [part, ...]."""
    unit = max(UNIT_ROUNDOFF.get(rung, 0.0), UNIT_ROUNDOFF.get(total.dtype.name, 0.0))
    first = found[0]
    if total.shape != addends.shape[1:]:
        raise ValueError(f"the sum is {list(total.shape)}, and its addends are {list(addends.shape[1:])}")
    residual = total.astype(np.float64) - addends.sum(axis=0)
    allowed = _MARGIN * len(found) * unit * float(np.linalg.norm(np.abs(addends).sum(axis=0)))
    size = float(np.linalg.norm(residual))
    excess = 0.0 if size == 0.0 else (size / allowed if allowed > 0.0 and np.isfinite(size) else np.inf)
    guilty = _guilty(found, addends, residual) if excess > 1.0 else ""
    return SumCheck(first.layer, first.site, position, float(excess), guilty)


def _guilty(found: Sequence[Piece], addends: NDArray[np.float64], residual: NDArray[np.float64]) -> str:
    """The rank whose part, times some factor, explains most of the difference."""
    best, text = _EXPLAINS, ""
    squared = float(np.sum(residual**2))
    for piece, addend in zip(found, addends, strict=True):
        size = float(np.sum(addend**2))
        if not size > 0.0 or not np.isfinite(squared):
            continue
        factor = float(np.sum(residual * addend)) / size
        share = factor**2 * size / squared
        if share > best:
            best = share
            what = {-1: "is missing from the sum", 1: "is in the sum twice"}.get(
                round(factor) if abs(factor - round(factor)) < 0.05 else 0, f"is in the sum {1 + factor:.3g} times"
            )
            text = f"the part of {piece.part.name} {what}"
    return text


def drift_by_part(
    prefill: Trace, decode: Trace, layer: int | None, site: Site, values: tuple[Any, Any], position: int
) -> dict[str, float]:
    """Return the relative difference of each part of a joined value, by the name of the part; empty if it has none.

    `values` are prefill's and decode's rows at the position, joined. NaN is infinitely far.
    """
    parts = prefill.parts.get((layer, site), ())
    if parts != decode.parts.get((layer, site), ()):
        return {}
    sides = [np.asarray(side).astype(np.float64) for side in values]
    found: dict[str, float] = {}
    for part in parts:
        if part.span is None:
            pair = [trace.addends.get((layer, site), {}).get((part.name, position)) for trace in (prefill, decode)]
            cut = [np.asarray(side).astype(np.float64) for side in pair if side is not None]
        else:
            axis = -1 if part.axis == "columns" else (1 if site in CACHE_SITES else 0)
            cut = [np.take(side, range(*part.span), axis=axis) for side in sides]
        if len(cut) == 2:
            size = float(np.linalg.norm(cut[0]))
            off = float(np.linalg.norm(cut[1] - cut[0]))
            drift = 0.0 if off == 0.0 else (off / size if size > 0.0 else np.inf)
            found[part.name] = drift if np.isfinite(drift) else np.inf
    return found
