"""Which cache read of prefill belongs to one of decode, where a layer attends more than once."""

from __future__ import annotations

from dataclasses import dataclass

from kvdrift.trace.model import CacheRead, Trace
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
