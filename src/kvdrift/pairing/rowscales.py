"""Keys and values that decode keeps by another scale, one for each row of a head, and whose scale it applies behind.

A kernel that reads a cache of integers or float8 may take the products of a query with what is stored and multiply them
by the scale of each key, and its probabilities by the scale of each value. Its rows are then those of prefill times a
factor of slot and head; its scores, as the softmax got them, and its context are those of prefill. Where the scale is
applied changes nothing that attention does, so decode's rows are divided by their factors before they are compared.

Where the scores or the context are others, the factor is a difference of the two passes and nothing is divided.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.reads import reads_of
from kvdrift.pairing.relabel import are_apart
from kvdrift.pairing.scored import scores_by_place
from kvdrift.pairing.slots import SlotMatches, rows_at, without_copies
from kvdrift.pairing.turned import rows_by_place
from kvdrift.trace.model import Array, CacheRead, CacheRecord, Slots, Trace
from kvdrift.vocabulary.sites import CACHE_SITES, Site

Floats = NDArray[np.float64]
Places = dict[tuple[int, Site], "RowScales"]

# A row of a head may be off from its factor by this share of itself; scores and contexts by this share of themselves,
# and by this share of what the factors change.
_NEAR, _LEFT_MOST = 1.0 / 16.0, 1.0 / 8.0
# So many slots tell whether rows are apart at all.
_FEW = 8


class RowScales(NamedTuple):
    """By what decode's rows are multiplied beside those of prefill: `factors` [slot, kv head] of `slots`, ascending."""

    slots: Slots
    factors: Floats

    @property
    def change(self) -> float:
        """What the factors change of a row, relative to it, in the root mean square."""
        return float(np.sqrt(np.mean((self.factors - 1.0) ** 2)))

    def of(self, slots: Slots) -> Floats:
        """Return the factors [slot, kv head] of some slots, 1 where they are not known."""
        at = np.minimum(np.searchsorted(self.slots, slots), len(self.slots) - 1)
        return np.where((self.slots[at] == slots)[:, None], self.factors[at], 1.0)

    def divided(self, read: CacheRead) -> CacheRead:
        """Return a read whose rows are divided by their factors, rounded to their dtype; others as they are."""
        if read.rows.ndim != 3 or read.rows.shape[1] % self.factors.shape[1]:
            return read
        by_head = self.of(read.slots).repeat(read.rows.shape[1] // self.factors.shape[1], axis=1)
        rows = (read.rows.astype(np.float64) / by_head[:, :, None]).astype(read.rows.dtype)
        return CacheRead(read.layer, read.site, read.positions, read.slots, rows)


def row_scales_of(prefill: Trace, decode: Trace, wanted: Sequence[int], left_out: Collection[int]) -> Places:
    """Return where decode keeps keys or values by scales of their own, at all `wanted` positions.

    Layers that are `left_out`, and those whose rows hold a NaN, an infinity or another order, have none.
    """
    found: Places = {}
    for layer in sorted(_layers_apart(prefill, decode) - set(left_out)):
        for site, harmless in ((Site.K_CACHE, _same_scores), (Site.V_CACHE, _same_context)):
            scales = _scales(_rows(prefill, decode, layer, site, tuple(wanted)))
            if scales is not None and harmless(prefill, decode, layer, tuple(wanted), scales):
                found[layer, site] = scales
    return found


def _layers_apart(prefill: Trace, decode: Trace) -> set[int]:
    """The layers in which a few rows of the first read of a site are apart."""
    first = [{(record.layer, record.site): record for record in reversed(trace.cache)} for trace in (prefill, decode)]
    layers = set()
    for place in first[0].keys() & first[1].keys():
        if place[1] not in CACHE_SITES or place[0] in layers:
            continue
        reads = without_copies(*(_beginning(side[place]) for side in first))
        common, *at = np.intersect1d(reads[0].slots, reads[1].slots, return_indices=True)
        sides = [read.rows[index] for read, index in zip(reads, at, strict=True)]
        if len(common) and sides[0].shape == sides[1].shape and are_apart(*sides):
            layers.add(place[0])
    return layers


def _beginning(read: CacheRecord) -> CacheRead:
    """A few rows of a read."""
    return CacheRead(read.layer, read.site, read.positions, read.slots[read.stored[:_FEW]], read.rows[:_FEW])


def _rows(
    prefill: Trace, decode: Trace, layer: int, site: Site, wanted: tuple[int, ...]
) -> Iterator[tuple[Slots, Array, Array]]:
    """The slots that both passes read in a layer, and their rows [slot, head, dim], one triple a position."""
    reads = [reads_of(trace, layer, site, wanted) for trace in (prefill, decode)]
    matches = SlotMatches()
    for position in sorted(reads[0].keys() & reads[1].keys()):
        first, second = without_copies(reads[0][position], reads[1][position])
        match = matches.find(first.slots, second.slots, position, None)
        if len(match.common) and first.rows.shape[1:] == second.rows.shape[1:] and first.rows.ndim == 3:
            yield match.common, rows_at(first.rows, match.of_prefill), rows_at(second.rows, match.of_decode)


def _scales(rows: Iterator[tuple[Slots, Array, Array]]) -> RowScales | None:
    """The factor of each row of a head, where every row is apart from that of prefill and is it times a positive one,
    the same whenever it is read; None where one is not."""
    known: dict[int, Floats] = {}
    for slots, prefill, decode in rows:
        first, second = prefill.astype(np.float64), decode.astype(np.float64)
        along, size = np.sum(first * second, axis=-1), np.sum(first**2, axis=-1)
        if not (np.isfinite(along).all() and np.isfinite(size).all()):
            return None
        factors = np.divide(along, size, out=np.ones_like(along), where=size > 0.0)
        off = np.linalg.norm(second - factors[..., None] * first, axis=-1)
        if not bool((factors > 0.0).all() and (off <= _NEAR * factors * np.sqrt(size)).all()):
            return None
        if bool((np.abs(factors - 1.0) <= _NEAR)[size > 0.0].any()):
            return None  # a cache keeps all its rows so, and a fault may be in a few
        for slot, factor in zip(slots.tolist(), factors, strict=True):
            if np.any(np.abs(known.setdefault(slot, factor) - factor) > _NEAR * factor):
                return None
    ordered = sorted(known)
    if not ordered:
        return None
    return RowScales(np.array(ordered, dtype=np.int64), np.stack([known[slot] for slot in ordered]))


def _same_scores(prefill: Trace, decode: Trace, layer: int, wanted: tuple[int, ...], scales: RowScales) -> bool:
    """Whether scores, up to a constant of each head, change by less than an eighth of what the factors would change."""
    places = [(layer, position) for position in wanted]
    first, second = (scores_by_place(trace, set(places)) for trace in (prefill, decode))
    room = _room(scales)
    return all(place in first and place in second and first[place].distance(second[place]) <= room for place in places)


def _same_context(prefill: Trace, decode: Trace, layer: int, wanted: tuple[int, ...], scales: RowScales) -> bool:
    """Whether contexts change by less than an eighth of what the factors would change."""
    first, second = (rows_by_place(trace, Site.ATTN_CTX, wanted) for trace in (prefill, decode))
    room = _room(scales)
    for place in [(layer, position) for position in wanted]:
        if place not in first or place not in second or first[place].shape != second[place].shape:
            return False
        right, wrong = first[place].astype(np.float64), second[place].astype(np.float64)
        if not np.linalg.norm(wrong - right) <= room * np.linalg.norm(right):
            return False
    return True


def _room(scales: RowScales) -> float:
    return min(_NEAR, _LEFT_MOST * scales.change)


__all__ = ["RowScales", "row_scales_of"]
