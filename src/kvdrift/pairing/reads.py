"""Which cache reads belong together, where a layer attends more than once, and which keys a pass sees."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvdrift.trace.model import Array, CacheRead, RowRecord, Slots, Trace
from kvdrift.vocabulary.sites import Site

_Key = tuple[int, Site, int]  # layer, site, position


@dataclass(frozen=True, slots=True)
class PairedReads:
    """The cache reads of prefill, in their order, and how many of decode are still to come, by spot.

    A layer may attend several times, each time to other values: the last read of one pass belongs to the last of the
    other.
    """

    found: dict[_Key, list[CacheRead]]
    left: dict[_Key, int]

    @classmethod
    def of(cls, prefill: Trace, decode: Trace, wanted: tuple[int, ...]) -> PairedReads:
        """Take the reads at the wanted positions."""
        reads = cls({}, {})
        for item in decode.cache:
            for key in ((item.layer, item.site, at) for at in item.positions):
                reads.left[key] = reads.left.get(key, 0) + 1
        for read in prefill.cache_reads():
            for at in read.positions:
                if at in wanted:
                    reads.found.setdefault((read.layer, read.site, at), []).append(read)
        return reads

    def get(self, key: _Key) -> CacheRead | None:
        """Return what the next read of decode at a spot belongs to, None where prefill has none."""
        if (found := self.found.get(key)) is None:
            return None
        left = self.left[key]
        self.left[key] -= 1
        return found[max(0, len(found) - left)]

    def keys(self) -> set[_Key]:
        """The spots that prefill has."""
        return set(self.found)


def reads_of(trace: Trace, layer: int, site: Site, wanted: Container[int] | None = None) -> dict[int, CacheRead]:
    """Return what a layer read of a site, the last time that it did, by position; at the `wanted` ones, or at all."""
    return {
        position: read
        for read in trace.cache_reads(layer)
        if read.site is site
        for position in read.positions
        if wanted is None or position in wanted
    }


def visible_keys(trace: Trace, wanted: tuple[int, ...]) -> dict[tuple[int, int], Slots]:
    """Return, for each layer and position, the logical positions of the keys whose scores are not masked."""
    visible: dict[tuple[int, int], Slots] = {}
    for record in trace.rows:
        if record.site is Site.ATTN_SCORES and record.slots is not None and record.layer is not None:
            for index, position in enumerate(record.positions):
                if position in wanted:
                    visible[record.layer, position] = record.slots[_seen(record, index)]
    return visible


def masked(scores: Array) -> NDArray[np.bool_]:
    """Return where a score is -inf (a NaN score is not masked)."""
    return np.asarray(scores.astype(np.float32) == -np.inf)


def _seen(record: RowRecord, index: int) -> NDArray[np.bool_]:
    """Keys that at least one head sees."""
    return np.asarray(~masked(record.values[index]).all(axis=0))
