"""What an explanation has to work with, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvdrift.address import Address
from kvdrift.sites import CACHE_SITES, Site
from kvdrift.trace.model import AttentionSpec, CacheRead, PassPair, Slots, Trace

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Values:
    """What one pass computed in one layer, by position: `sites` [element] vectors, `reads` rows of the cache, and for
    attention rows the logical position of each key column."""

    sites: dict[tuple[Site, int], Floats]
    slots: dict[tuple[Site, int], Slots]
    reads: dict[tuple[Site, int], CacheRead]

    def at(self, site: Site, position: int) -> Floats | None:
        """Return the values of a site at a position, None if it was not captured."""
        return self.sites.get((site, position))


@dataclass(frozen=True, slots=True)
class Suspect:
    """Both passes in the layer where a mismatch begins, at one rung. Position `address.position` failed first;
    `positions` are all those that both passes have."""

    address: Address
    rung: str
    positions: tuple[int, ...]
    prefill: Values
    decode: Values
    spec: AttentionSpec | None

    @property
    def others(self) -> tuple[int, ...]:
        """The positions besides the one that failed first, to test an explanation on data that it was not fitted to."""
        return tuple(p for p in self.positions if p != self.address.position)


@dataclass(frozen=True, slots=True, order=True)
class Candidate:
    """One explanation: the share of the squared difference that it removes (1 is all of it), and what it says."""

    explained: float
    cause: str = field(compare=False)
    text: str = field(compare=False)


def share(prefill: Floats, decode: Floats, predicted: Floats) -> float:
    """Return how much of the difference between the passes the prediction of decode removes: at most 1, or negative.

    Without a difference, or with values that are not finite, nothing can be explained: 0.
    """
    if predicted.shape != decode.shape or prefill.shape != decode.shape:
        return 0.0
    total = float(np.sum((decode - prefill) ** 2))
    left = float(np.sum((decode - predicted) ** 2))
    if not np.isfinite(total) or not np.isfinite(left) or total == 0.0:
        return 0.0
    return 1.0 - left / total


def collect(pair: PassPair, address: Address) -> Suspect:
    """Take what a diagnosis needs out of a pair of traces: one layer, all positions."""
    prefill, decode = _values(pair.prefill, address.layer), _values(pair.decode, address.layer)
    spec = None if address.layer is None else pair.prefill.attention.get(address.layer)
    return Suspect(address, pair.prefill.rung, tuple(sorted(pair.positions)), prefill, decode, spec)


def _values(trace: Trace, layer: int | None) -> Values:
    sites: dict[tuple[Site, int], Floats] = {}
    slots: dict[tuple[Site, int], Slots] = {}
    for record in trace.rows:
        if record.layer != layer:
            continue
        for index, position in enumerate(record.positions):
            sites[record.site, position] = record.values[index].astype(np.float64)
            if record.slots is not None:
                slots[record.site, position] = record.slots
    reads = {
        (read.site, position): read
        for read in (trace.cache_reads() if layer is not None else ())
        if read.layer == layer and read.site in CACHE_SITES
        for position in read.positions
    }
    return Values(sites, slots, reads)
