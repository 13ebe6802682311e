"""What of two perturbed traces and a clean one is compared: their mean; beside rows of zeros, half of what changed."""

from __future__ import annotations

from collections.abc import Collection, Iterator

import numpy as np

from kvdrift.trace.model import Array, CacheRecord, RowRecord, Trace
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site


def all_zero(trace: Trace, sites: Collection[Site]) -> Iterator[Place]:
    """The places at which every recorded row of some position is zero."""
    for record in trace.rows:
        if record.site in sites and not record.values.any():
            yield Place(record.layer, record.site)


def middle_of(prompt: str, above: Trace, below: Trace) -> Trace:
    """The mean of two traces of one route, as a trace of `prompt`; what only one of them has is left out."""
    rows = {(r.layer, r.site, r.positions): r for r in below.rows}
    reads = {(r.layer, r.site, r.positions): r for r in below.cache_reads()}
    found = Trace(prompt, above.pass_name, above.label, above.rung, above.tokens, above.calls)
    for row in above.rows:
        other = rows.get((row.layer, row.site, row.positions))
        if other is not None and other.values.shape == row.values.shape:
            values = _mean(row.values, other.values)
            found.rows.append(RowRecord(row.layer, row.site, row.positions, values, row.slots))
    for read in above.cache_reads():
        partner = reads.get((read.layer, read.site, read.positions))
        if partner is not None and partner.rows.shape == read.rows.shape:
            whole = np.arange(len(read.slots))
            values = _mean(read.rows, partner.rows)
            found.cache.append(CacheRecord(read.layer, read.site, read.positions, read.slots, whole, values))
    return found


def beside_zeros(base: Trace, above: Trace, below: Trace, sites: Collection[Site]) -> tuple[Trace, Trace] | None:
    """Half of what came through where `base` is all zeros, and the same with the second difference in it, halved; None
    where it is zero nowhere.

    The drift of the second against the first is half of the second difference, relative to half of what came through.
    Masked keys stay what they are.
    """
    zeros = {(row.layer, row.site, at): value for row in base.rows for at, value in _zero_rows(row, sites)}
    if not zeros:
        return None
    down = {(row.layer, row.site, row.positions): row.values for row in below.rows}
    halves, moved = (Trace(base.prompt, above.pass_name, above.label, above.rung, above.tokens) for _ in range(2))
    for row in above.rows:
        other = down.get((row.layer, row.site, row.positions))
        if other is None or other.shape != row.values.shape:
            continue
        for index, at in enumerate(row.positions):
            zero = zeros.get((row.layer, row.site, at))
            if zero is None or zero.shape != row.values.shape[1:]:
                continue
            up_down = row.values[index].astype(np.float64), other[index].astype(np.float64)
            with np.errstate(invalid="ignore"):
                half, mean = 0.5 * (up_down[0] - up_down[1]), 0.5 * (up_down[0] + up_down[1])
            for trace, values in ((halves, half), (moved, half + mean)):
                kept = np.where(np.isfinite(zero), values, zero)[None].astype(row.values.dtype)
                trace.rows.append(RowRecord(row.layer, row.site, (at,), kept, row.slots))
    return (halves, moved) if halves.rows else None


def _zero_rows(row: RowRecord, sites: Collection[Site]) -> Iterator[tuple[int, Array]]:
    """The positions of a record whose values are all zero or masked, with them."""
    if row.site in sites:
        for at, values in zip(row.positions, row.values, strict=True):
            if not np.any(values, where=np.isfinite(values)):
                yield at, values


def _mean(first: Array, second: Array) -> Array:
    with np.errstate(invalid="ignore"):
        return np.asarray(0.5 * first.astype(np.float64) + 0.5 * second.astype(np.float64)).astype(first.dtype)


__all__ = ["all_zero", "beside_zeros", "middle_of"]
