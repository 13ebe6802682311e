"""Pairs up two passes: strictly by prompt, token id, position, layer and site. What has no partner is counted.

Knows traces; computes nothing. Cache reads are paired slot by slot, attention rows key by key.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import numpy as np

from kvdrift.errors import AlignmentError
from kvdrift.pairing.attention_rows import Row, at_totals, by_slot, is_wider_than, same_dtype, same_keys
from kvdrift.pairing.biases import Biases
from kvdrift.pairing.folded import Folds, folds_of
from kvdrift.pairing.gains import NORMS, Floats, gains_of, multiplied
from kvdrift.pairing.grids import at_fewer_bits
from kvdrift.pairing.kernels import as_floats
from kvdrift.pairing.reads import PairedReads, visible_keys
from kvdrift.pairing.relabel import Order, agree, order_of_keys
from kvdrift.pairing.rowscales import RowScales, row_scales_of
from kvdrift.pairing.slots import (
    Context,
    Matched,
    SlotMatch,
    SlotMatches,
    layers_of_two_forms,
    match_by_content,
    order_of_slots,
    reordered,
    rows_at,
    without_copies,
    without_spare_bits,
)
from kvdrift.pairing.turned import IN_FRAMES, Turns, common_turns
from kvdrift.trace.model import Array, CacheRead, PassPair, RowRecord, Slots, Trace
from kvdrift.vocabulary.address import Address, Spot
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, STATE_SITES, Site, forward_rank

# Sites that one pass may keep wider than the other: nothing but the reader comes after them.
_OF_ANY_DTYPE = ATTENTION_ROW_SITES | {Site.LOGITS}
_CONTEXT = frozenset({Site.ATTN_CTX})
# The residual stream, which one pass may keep wider than the model.
_STREAM = frozenset({Site.EMBED_OUT, Site.LAYER_IN, Site.RESID_ATTN, Site.LAYER_OUT})
# Roundings of 16 bits by which a row may be off that was turned back or divided, and rounded again.
_MOST_OFF = 4.0
_HALF_UNITS = {dtype: UNIT_ROUNDOFF[dtype] for dtype in HALF}


@dataclass(frozen=True, slots=True)
class Pair:
    """The two values of one site at some positions: `prefill` and `decode` [position, element].

    `slots` is set for cache reads: the logical positions of the rows compared, and `row_size` the elements of a row; of
    attention rows, `row_size` is the number of keys. `n_lost` counts keys or slots that one side has and the other
    lacks, among those that prefill attends to. `is_rounded` says that the passes recorded two dtypes or two frames, and
    that one side was rounded for the comparison: bits then prove nothing, and `n_off` counts the cache rows of earlier
    tokens that are off by more than that. `n_heads` are the kv heads of a cache row.
    """

    layer: int | None
    site: Site
    positions: tuple[int, ...]
    prefill: Array
    decode: Array
    slots: Slots | None = None
    row_size: int = 0
    n_lost: int = 0
    is_rounded: bool = False
    n_heads: int = 1
    n_off: int = 0


@dataclass(slots=True)
class Unpaired:
    """A value that only one pass has (TRACE_OFFSET)."""

    prompt: str
    layer: int | None
    site: Site
    position: int
    only_in: str
    why: str = "no partner"

    @property
    def address(self) -> Address:
        return Address(self.prompt, self.position, self.layer, self.site)


@dataclass(slots=True)
class Aligner:
    """Walks through the pairs of two traces, of `sites` alone if they are given; `unpaired` is complete once the walk
    has ended."""

    pair: PassPair
    unpaired: list[Unpaired] = field(default_factory=list)
    sites: frozenset[Site] | None = None
    folds: Folds = field(default_factory=Folds)  # known once the walk has begun, as the turns
    turns: Turns = field(default_factory=Turns)
    scales: dict[tuple[int, Site], RowScales] = field(default_factory=dict)
    gains: Mapping[tuple[int | None, Site], Floats] = field(default_factory=dict)  # those of other positions, before

    def pairs(self) -> Iterator[Pair]:
        """Yield every pair, grouped over positions where all positions have the same shape."""
        prefill, decode = self.pair.prefill, self.pair.decode
        wanted = self._positions()
        if self.sites is None or self.sites & IN_FRAMES:
            self.folds = folds_of(prefill, decode, wanted)
            self.turns = common_turns(prefill, decode, wanted, self.folds.by_layer.keys())
            moved = {*self.folds.by_layer, *self.turns.layers}
            self.scales = row_scales_of(prefill, decode, wanted, moved)
        if self.sites is None or self.sites & NORMS:
            self.gains = gains_of(prefill, decode, wanted, self.gains)
        visible = visible_keys(prefill, wanted)
        rows = _by_place(prefill, self.sites), _by_place(decode, self.sites)
        for layer in layers_of_two_forms(prefill, decode):
            self._other_form(layer, rows, wanted)
        yield from self._row_pairs(*rows, wanted)
        if self.sites is not None and not self.sites & CACHE_SITES:
            return
        yield from self._cache_pairs(prefill, decode, wanted, visible)

    def _positions(self) -> tuple[int, ...]:
        """The asked positions at which both passes hold the same token; at the others nothing can be compared."""
        prefill, decode = self.pair.prefill, self.pair.decode
        if prefill.prompt != decode.prompt or prefill.rung != decode.rung:
            raise AlignmentError(
                f"traces of different runs: prefill {prefill.prompt} at {prefill.rung}, decode {decode.prompt} at "
                f"{decode.rung}"
            )
        agreed = []
        for position in self.pair.positions:
            if prefill.tokens[: position + 1] == decode.tokens[: position + 1] and position < len(prefill.tokens):
                agreed.append(position)
            else:
                self._lost(
                    None, Site.EMBED_OUT, position, "both", _tokens_differ(prefill.tokens, decode.tokens, position)
                )
        return tuple(agreed)

    def _other_form(self, layer: int, rows: tuple[_Records, _Records], wanted: tuple[int, ...]) -> None:
        """Leave out the queries of a layer: one belongs to keys of its own form, whatever its width is."""
        found = [records.pop((layer, Site.Q_ROPE), []) for records in rows]
        for position in sorted({at for records in found for record in records for at in record.positions}):
            if position in wanted:
                self._lost(layer, Site.Q_ROPE, position, "both", "the keys that it meets are of another shape")

    def _row_pairs(self, prefill: _Records, decode: _Records, wanted: tuple[int, ...]) -> Iterator[Pair]:
        turned = self.turns.places | self.folds.places | self.gains.keys()
        whole = {
            place: None if place in turned else _whole_pair(place, prefill[place], decode.get(place, []), wanted)
            for place in prefill
        }
        rest = self._rest(
            _rows({place: prefill[place] for place, pair in whole.items() if pair is None}, wanted),
            _rows({place: records for place, records in decode.items() if whole.get(place) is None}, wanted),
        )
        context = _context(prefill, decode)
        parts: dict[tuple[int | None, Site], list[_Item]] = {}
        for place, pair in whole.items():
            if pair is not None:
                yield pair()  # one after the other: all of them together are as large as what was recorded
                continue
            if place[0] in rest:
                parts |= self._parts(*rest.pop(place[0]), context)
            for chunk in _alike(parts.pop(place, [])):
                yield _stacked(place, chunk)

    def _rest(
        self, prefill: dict[Spot, Row], decode: dict[Spot, Row]
    ) -> dict[int | None, tuple[dict[Spot, Row], dict[Spot, Row]]]:
        """The rows of both passes by layer; what has no partner is noted."""
        ends = self.pair.prefill.call_ends() & self.pair.decode.call_ends()
        prefill, decode = _without_passing_states(prefill, ends), _without_passing_states(decode, ends)
        for key in sorted(prefill.keys() ^ decode.keys(), key=_forward):
            self._lost(*key, "prefill" if key in prefill else "decode")
        found: dict[int | None, tuple[dict[Spot, Row], dict[Spot, Row]]] = {}
        for side, rows in enumerate((prefill, decode)):
            for key, row in rows.items():
                found.setdefault(key[0], ({}, {}))[side][key] = row
        return found

    def _parts(
        self, prefill: dict[Spot, Row], decode: dict[Spot, Row], context: Context
    ) -> dict[tuple[int | None, Site], list[_Item]]:
        """The pairs of rows of each place of a layer, one a position."""
        groups: dict[tuple[int | None, Site], list[_Item]] = {}
        of_slots = {
            key: by_slot(key[1], row, decode[key])
            for key, row in prefill.items()
            if key in decode and row.slots is not None
        }
        orders, biases = _orders_of_keys(of_slots, context), Biases(self.pair)
        for (layer, site, position), row in prefill.items():
            other = decode.get((layer, site, position))
            if other is None:
                continue
            rows, told = of_slots.get((layer, site, position)), None
            if site is Site.ATTN_SCORES and rows is not None and (layer, position) not in orders:
                told = biases.with_that_of_prefill(layer, position, rows)
                rows = rows if told is None else (rows[0], told)
            first, second, n_lost = same_keys(site, row, other, rows, orders.get((layer, position)))
            is_rounded = site in _OF_ANY_DTYPE and first.dtype != second.dtype
            if told is not None:
                is_rounded = True
            elif is_rounded or site is Site.ATTN_SCORES:
                first, second = same_dtype(first, second)
                if site is Site.ATTN_SCORES and self.pair.prefill.rung in HALF:
                    first, second, fewer = at_fewer_bits(first, second, self.pair.prefill.rung, self._scale(layer))
                    is_rounded = is_rounded or fewer
            elif site is Site.Q_ROPE or site in _STREAM:
                first, second = without_spare_bits(first, second)
                if site in _STREAM and is_wider_than(self.pair.prefill.rung, first, second):
                    first, second = same_dtype(first, second)
                    is_rounded = True
            if site is Site.ATTN_PROBS:
                whole = at_totals(first, second, context(layer, position))
                second, is_rounded = whole, is_rounded or whole is not second
            turned = self.folds.row(layer, site, first, self.turns.row(layer, site, position, first, second))
            if (layer, site) in self.gains:
                turned = multiplied(turned, self.gains[layer, site])
            second, is_rounded = turned, is_rounded or turned is not second
            if first.shape != second.shape or first.dtype != second.dtype:
                what = f"shapes {first.shape} and {second.shape}, dtypes {first.dtype} and {second.dtype}"
                self._lost(layer, site, position, "both", what)
                continue
            if first.size == 0:
                self._lost(layer, site, position, "both", "no key is visible in either")
                continue
            item = _Item(position, first.ravel(), second.ravel(), first.shape[-1], n_lost, is_rounded)
            groups.setdefault((layer, site), []).append(item)
        return groups

    def _scale(self, layer: int | None) -> float:
        """By what products of queries and keys are multiplied in a layer, 1 where that is not known."""
        spec = None if layer is None else self.pair.prefill.attention.get(layer)
        return spec.scale if spec is not None and spec.scale else 1.0

    def _cache_pairs(
        self, prefill: Trace, decode: Trace, wanted: tuple[int, ...], visible: dict[tuple[int, int], Slots]
    ) -> Iterator[Pair]:
        reads = PairedReads.of(prefill, decode, wanted)
        met: set[Spot] = set()
        matches = SlotMatches()
        context = _context(_by_place(prefill, _CONTEXT), _by_place(decode, _CONTEXT))
        held: dict[tuple[int, int], Matched] = {}  # keys that stand in another order, until their values come
        of_decode: dict[tuple[int, int], Slots] = {}  # visible to decode, where it is asked for

        def paired(item: Matched, order: Order | None) -> Iterator[Pair]:
            of_keys = item.decode.site is Site.K_CACHE
            turned = of_keys and (item.decode.layer, item.position) in self.turns.by_place
            turned = turned or (item.decode.layer, item.decode.site) in {*self.folds.places, *self.scales}
            pair = _cache_pair(item.prefill, item.decode, item.position, reordered(item.match, order), turned)
            if pair is not None and turned and (unit := _HALF_UNITS.get(self.pair.prefill.rung)):
                pair = replace(pair, n_off=_rows_off(pair, _MOST_OFF * unit))
            if pair is None:
                key = (item.decode.layer, item.decode.site, item.position)
                self._lost(*key, "both", "no slot in common, or rows of different shape or dtype")
            else:
                yield pair

        for read in decode.cache_reads():
            for position in read.positions:
                if position not in wanted:
                    continue
                key = (read.layer, read.site, position)
                met.add(key)
                reference = reads.get(key)
                if reference is None:
                    self._lost(*key, "decode")
                    continue
                match = matches.find(reference.slots, read.slots, position, visible.get((read.layer, position)))
                item = Matched(*without_copies(reference, read), position, match)
                place = (read.layer, position)
                item = item._replace(decode=self._restored(item.decode, position))
                if read.site is Site.K_CACHE and (match.n_lost or item.is_gross):
                    held[place] = item
                    continue
                keys = held.pop(place, None) if read.site is Site.V_CACHE else None
                order = None
                if keys is not None and keys.match.n_lost:
                    of_decode = of_decode or visible_keys(decode, wanted)
                    seen = visible.get(place), of_decode.get(place)
                    if (found := match_by_content(keys, item, seen, context)) is not None:
                        keys, item = (each._replace(match=found) for each in (keys, item))
                elif keys is not None:
                    order = order_of_slots(keys, item, context)
                if keys is not None:
                    yield from paired(keys, order)
                yield from paired(item, order)
        for item in held.values():
            yield from paired(item, None)
        for key in sorted(reads.keys() - met, key=_forward):
            self._lost(*key, "prefill")

    def _restored(self, read: CacheRead, position: int) -> CacheRead:
        """Decode's rows in the frame and at the scale that prefill has them."""
        scales = self.scales.get((read.layer, read.site))
        return self.folds.read(self.turns.read(read if scales is None else scales.divided(read), position))

    def _lost(self, layer: int | None, site: Site, position: int, only_in: str, why: str = "no partner") -> None:
        self.unpaired.append(Unpaired(self.pair.prefill.prompt, layer, site, position, only_in, why))


OTHER_TOKENS = "the tokens differ at position "


def _tokens_differ(prefill: tuple[int, ...], decode: tuple[int, ...], position: int) -> str:
    """Say where two passes are given other tokens for the first time, up to `position`."""
    first = next(
        (at for at, (a, b) in enumerate(zip(prefill, decode, strict=False)) if a != b), min(len(prefill), len(decode))
    )
    sides = [str(tokens[first]) if first < len(tokens) else "none" for tokens in (prefill, decode)]
    return f"{OTHER_TOKENS}{min(first, position)}: {sides[0]} in prefill, {sides[1]} in decode"


class _Item(NamedTuple):
    """One position's pair of rows, flat."""

    position: int
    prefill: Array
    decode: Array
    row_size: int
    n_lost: int
    is_rounded: bool


_Records = dict[tuple[int | None, Site], list[RowRecord]]


def _by_place(trace: Trace, sites: frozenset[Site] | None) -> _Records:
    """What a trace recorded, by layer and site, in the order in which places come first."""
    found: _Records = {}
    for record in trace.rows:
        if sites is None or record.site in sites:
            found.setdefault((record.layer, record.site), []).append(record)
    return found


def _whole_pair(
    place: tuple[int | None, Site], prefill: list[RowRecord], decode: list[RowRecord], wanted: tuple[int, ...]
) -> Callable[[], Pair] | None:
    """Return what pairs the rows of a place at once, where prefill has all of them in one record, and decode has one
    record for each position, or for all of them, alike."""
    site = place[1]
    if len(prefill) != 1 or not decode or site in ATTENTION_ROW_SITES or site in STATE_SITES:
        return None
    (first,) = prefill
    if first.positions == wanted:
        at, positions = list(range(len(wanted))), wanted
    else:
        at = [index for index, position in enumerate(first.positions) if position in wanted]
        positions = tuple(first.positions[index] for index in at)
    if len(decode) > 1:  # kv_aligned walks from the last position to the first
        by_position = {record.positions[0]: record for record in decode if len(record.positions) == 1}
        if len(by_position) != len(decode) or by_position.keys() != set(positions):
            return None
        decode = [by_position[position] for position in positions]
    elif decode[0].positions != positions:
        return None
    shape, dtype = first.values.shape[1:], first.values.dtype
    if len(set(positions)) != len(positions) or not positions or first.values.size == 0 or first.slots is not None:
        return None
    for record in decode:
        if record.slots is not None or record.values.shape[1:] != shape or record.values.dtype != dtype:
            return None
    return partial(_put_together, place, positions, first.values, at, [record.values for record in decode])


def _put_together(
    place: tuple[int | None, Site], positions: tuple[int, ...], prefill: Array, at: list[int], decode: list[Array]
) -> Pair:
    rows = prefill if len(at) == len(prefill) else prefill[at]
    values = np.concatenate(decode) if len(decode) > 1 else decode[0]
    return Pair(*place, positions, rows.reshape(len(at), -1), values.reshape(len(at), -1))


def _stacked(place: tuple[int | None, Site], items: list[_Item]) -> Pair:
    """Rows of a place that are alike, as one pair."""
    prefill, decode = (
        np.concatenate(rows).reshape(len(rows), -1) if len(rows) > 1 else rows[0][None]
        for rows in ([item.prefill for item in items], [item.decode for item in items])
    )
    layer, site = place
    return Pair(
        layer,
        site,
        tuple(item.position for item in items),
        prefill,
        decode,
        row_size=items[0].row_size if site in ATTENTION_ROW_SITES else 0,
        n_lost=items[0].n_lost,
        is_rounded=items[0].is_rounded,
    )


def _rows(records: _Records, wanted: tuple[int, ...]) -> dict[Spot, Row]:
    """Every row at one of the `wanted` positions."""
    return {
        (layer, site, position): Row(record.values[index], record.slots)
        for (layer, site), found in records.items()
        for record in found
        for index, position in enumerate(record.positions)
        if position in wanted
    }


def _context(prefill: _Records, decode: _Records) -> Context:
    """A look-up of what attention handed on in both passes, None where one of them did not record it."""

    def at(layer: int | None, position: int) -> tuple[Array, Array] | None:
        place = (layer, Site.ATTN_CTX)
        key = (*place, position)
        sides = [_rows({place: records.get(place, [])}, (position,)).get(key) for records in (prefill, decode)]
        return None if sides[0] is None or sides[1] is None else (sides[0].values, sides[1].values)

    return at


def _forward(key: Spot) -> tuple[tuple[int, int], int]:
    layer, site, position = key
    return (forward_rank(layer, site), position)


def _without_passing_states(rows: dict[Spot, Row], ends: frozenset[int]) -> dict[Spot, Row]:
    """Leave out recurrent states at positions that only one route stops at: the other has no state to show there."""
    return {key: row for key, row in rows.items() if key[1] not in STATE_SITES or key[2] in ends}


def _orders_of_keys(
    of_slots: dict[Spot, tuple[Array, Array] | None], context: Context
) -> dict[tuple[int | None, int], Order]:
    """Where decode's scores stand in another order of keys and its context shows that this does no harm: the order."""
    orders = {}
    for (layer, site, position), rows in of_slots.items():
        if site is not Site.ATTN_SCORES or rows is None:
            continue
        order = order_of_keys(*rows)
        if order is not None and (contexts := context(layer, position)) is not None and agree(*contexts):
            orders[layer, position] = order
    return orders


def _cache_pair(
    prefill: CacheRead, decode: CacheRead, position: int, match: SlotMatch, is_rounded: bool
) -> Pair | None:
    """Pair the rows that prefill attends to at `position`, slot by slot; rows that decode lacks are counted."""
    if (
        len(match.common) == 0
        or prefill.rows.shape[1:] != decode.rows.shape[1:]
        or prefill.rows.dtype != decode.rows.dtype
    ):
        return None
    return Pair(
        prefill.layer,
        prefill.site,
        (position,),
        rows_at(prefill.rows, match.of_prefill).reshape(1, -1),
        rows_at(decode.rows, match.of_decode).reshape(1, -1),
        slots=match.common,
        row_size=math.prod(prefill.rows.shape[1:]),
        n_lost=match.n_lost,
        is_rounded=is_rounded,
        n_heads=int(prefill.rows.shape[1]),
    )


def _rows_off(pair: Pair, most: float) -> int:
    """How many rows of tokens before that of a cache read are off in a head by more than a share `most` of it."""
    assert pair.slots is not None
    shape = (len(pair.slots), pair.n_heads, -1)
    first, second = (
        as_floats(side).reshape(shape)[pair.slots < pair.positions[0]] for side in (pair.prefill, pair.decode)
    )
    off = np.linalg.norm(second - first, axis=-1) > most * np.linalg.norm(first, axis=-1)
    return int(off.any(axis=1).sum())


def _alike(items: list[_Item]) -> Iterator[list[_Item]]:
    """Split into runs that can be stacked: equal element counts, and what is not whole kept apart."""
    by_kind: dict[tuple[int, int, int, bool], list[_Item]] = {}
    for item in items:
        kind = (item.prefill.size, item.row_size, item.n_lost, item.is_rounded)
        by_kind.setdefault(kind, []).append(item)
    yield from by_kind.values()
