"""Which rows of two cache reads hold the same slots, and where decode has them in another order that does no harm.

Attention does not know an order of keys: an engine may hand it the pages of a sequence in any order, if keys and values
stand in the same one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from kvdrift.pairing.relabel import Order, agree, are_apart, order_of_keys
from kvdrift.trace.model import Array, CacheRead, Slots, Trace
from kvdrift.vocabulary.sites import Site

# So many elements of a cached row tell whether rows stand in another order.
_FEW = 16

Context = Callable[[int | None, int], tuple[Array, Array] | None]  # of a layer at a position, prefill's and decode's


@dataclass(slots=True)
class SlotMatches:
    """Which rows of two cache reads hold the same slots; all layers of a call ask it of the same slots."""

    _known: dict[tuple[bytes | int | None, ...], SlotMatch] = field(default_factory=dict)

    def find(self, prefill: Slots, decode: Slots, position: int, visible: Slots | None) -> SlotMatch:
        """Match the slots that prefill attends to at `position`."""
        key = (prefill.tobytes(), decode.tobytes(), position, None if visible is None else visible.tobytes())
        if key not in self._known:
            self._known[key] = _match_slots(prefill, decode, position, visible)
        return self._known[key]


class SlotMatch(NamedTuple):
    """The common slots, where prefill and decode have them, and how many slots decode lacks."""

    common: Slots
    of_prefill: Slots
    of_decode: Slots
    n_lost: int


class Matched(NamedTuple):
    """Two reads of a cache site at one position, and which of their rows hold the same slots."""

    prefill: CacheRead
    decode: CacheRead
    position: int
    match: SlotMatch

    @property
    def is_gross(self) -> bool:
        """Whether rows differ by more than rounding may make of them, as far as a few of their elements tell."""
        rows = self.rows(_FEW)
        return rows is not None and are_apart(*rows)

    def rows(self, elements: int | None = None) -> tuple[Array, Array] | None:
        """The common rows [element, slot] of both, or so many of their first elements; None if there are none alike."""
        first, second = self.prefill.rows, self.decode.rows
        if not len(self.match.common) or first.shape[1:] != second.shape[1:] or first.dtype != second.dtype:
            return None
        sides = ((first, self.match.of_prefill), (second, self.match.of_decode))
        left, right = (rows_at(rows.reshape(len(rows), -1)[:, :elements], at).T for rows, at in sides)
        return left, right


def rows_at(rows: Array, at: Slots) -> Array:
    """Return the rows `at`; not a copy where they follow upon one another, as they nearly always do."""
    start, stop = int(at[0]), int(at[-1]) + 1
    follow = stop - start == len(at) and bool((at[1:] - at[:-1] == 1).all())
    return rows[start:stop] if follow else rows[at]


def without_copies(prefill: CacheRead, decode: CacheRead) -> tuple[CacheRead, CacheRead]:
    """Return two reads with as many heads and of one dtype: where one pass hands attention a copy of a head for each
    query of its group, or the same numbers in a wider dtype, that is undone. Reads of another form stay as they are."""
    few = min(prefill.rows.shape[1], decode.rows.shape[1])
    rows = without_spare_bits(*(_heads_once(read.rows, few) for read in (prefill, decode)))
    return tuple(  # type: ignore[return-value]
        read if found is read.rows else replace(read, rows=found)
        for read, found in zip((prefill, decode), rows, strict=True)
    )


def without_spare_bits(prefill: Array, decode: Array) -> tuple[Array, Array]:
    """Return the two arrays in the narrower of their dtypes, if the wider one holds numbers of the narrower alone: what
    was widened on its way. Others, and those with a NaN, stay as they are."""
    if prefill.dtype == decode.dtype or prefill.dtype.itemsize == decode.dtype.itemsize:
        return prefill, decode
    sides = [prefill, decode]
    wide = 0 if prefill.dtype.itemsize > decode.dtype.itemsize else 1
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = sides[wide].astype(sides[1 - wide].dtype)
    if bool((narrow.astype(np.float64) == sides[wide].astype(np.float64)).all()):
        sides[wide] = narrow
    return sides[0], sides[1]


def _heads_once(rows: Array, n_heads: int) -> Array:
    """Every head of `rows` [slot, head, dim] once, if they are copies of `n_heads` heads, each copy beside its like."""
    heads = rows.shape[1]
    if heads == n_heads or n_heads == 0 or heads % n_heads:
        return rows
    grouped = rows.reshape(rows.shape[0], n_heads, heads // n_heads, *rows.shape[2:])
    first = grouped[:, :, :1]
    return first[:, :, 0] if np.array_equal(grouped, np.broadcast_to(first, grouped.shape)) else rows


def layers_of_two_forms(prefill: Trace, decode: Trace) -> list[int]:
    """Return the layers in which the passes attend to keys of another shape, as latent and expanded ones are."""
    first = [
        {record.layer: record.rows for record in reversed(trace.cache) if record.site is Site.K_CACHE}
        for trace in (prefill, decode)
    ]
    found = []
    for layer in sorted(first[0].keys() & first[1].keys()):
        sides = [rows[layer] for rows in first]
        few = min(rows.shape[1] for rows in sides)
        if len({_heads_once(rows, few).shape[1:] for rows in sides}) > 1:
            found.append(layer)
    return found


def order_of_slots(keys: Matched, values: Matched, context: Context) -> Order | None:
    """The order in which decode has its slots, where keys and values stand in one other order and its context shows
    that this does no harm; None for no such order."""
    of_keys, of_values = keys.rows(), values.rows()
    contexts = context(keys.decode.layer, keys.position)
    if of_keys is None or of_values is None or contexts is None or of_keys[0].shape[1] != of_values[0].shape[1]:
        return None
    order = order_of_keys(*of_keys)
    if order is None or are_apart(of_values[0], of_values[1][:, order]) or not agree(*contexts):
        return None
    return order


def match_by_content(
    keys: Matched, values: Matched, seen: tuple[Slots | None, Slots | None], context: Context
) -> SlotMatch | None:
    """Match the rows that prefill sees with those that decode sees, whatever slots they are labelled with: a function
    that moves keys where nobody sees it, such as a ring, moves the labels of scores away, and those of rows or not.

    None unless keys and values are the same ones, as many of them, and the context shows that this does no harm. Scores
    that are no longer the same in any order are found by themselves.

    Args:
        keys: of both passes, as labelled.
        values: of the same slots.
        seen: the labels of the scores that each pass computes, None where that was not recorded.
        context: of both passes.
    """
    contexts = context(keys.decode.layer, keys.position)
    reads = (keys.prefill, values.prefill), (keys.decode, values.decode)
    if contexts is None or not agree(*contexts) or any(not np.array_equal(k.slots, v.slots) for k, v in reads):
        return None
    if seen[0] is None or seen[1] is None or len(seen[0]) != len(seen[1]):
        return None
    for labels in (seen[0], seen[1]):
        first = np.flatnonzero(np.isin(keys.prefill.slots, labels))
        second = np.flatnonzero(np.isin(keys.decode.slots, seen[1]))
        match = SlotMatch(keys.prefill.slots[first], first, second, 0)
        if len(first) != len(second) or (rows := keys._replace(match=match).rows()) is None:
            continue
        found = reordered(match, order_of_keys(*rows))
        sides = [item._replace(match=found).rows() for item in (keys, values)]
        if all(side is not None and not are_apart(*side) for side in sides):
            return found
    return None


def reordered(match: SlotMatch, order: Order | None) -> SlotMatch:
    return match if order is None else match._replace(of_decode=match.of_decode[order])


def _match_slots(prefill: Slots, decode: Slots, position: int, visible: Slots | None) -> SlotMatch:
    needed = prefill[prefill <= position]
    if visible is not None:
        needed = np.intersect1d(needed, visible)
    common = np.intersect1d(needed, decode)
    # An engine may keep its slots in any order, as a window that wraps around does.
    orders = np.argsort(prefill), np.argsort(decode)
    if len(common) == 0:
        return SlotMatch(common, common, common, len(needed))
    of_prefill, of_decode = (
        order[np.searchsorted(slots, common, sorter=order)]
        for slots, order in zip((prefill, decode), orders, strict=True)
    )
    return SlotMatch(common, of_prefill, of_decode, len(needed) - len(common))


__all__ = [
    "Context",
    "Matched",
    "SlotMatch",
    "SlotMatches",
    "layers_of_two_forms",
    "match_by_content",
    "order_of_slots",
    "reordered",
    "rows_at",
    "without_copies",
    "without_spare_bits",
]
