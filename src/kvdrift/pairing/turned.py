"""Queries and keys that one pass has in another frame: turned alike, so that all of their products stay as they are.

Attention takes nothing from queries and keys but their products. A pass that counts positions from another token on,
as one that counts the padding of its row, rotates all of them alike, and a kernel may keep their features in another
order. Such a frame is an orthogonal matrix Q for each kv head with

    q' = q Q   and   k' = k Q   for every query of its group and every key that is read.

It exists if and only if all products are the same, and is found by the orthogonal Procrustes problem (Schoenemann 1966)
where queries differ grossly. Decode's rows are then turned back before they are compared. A query or a key that is
turned by itself is in no such frame, and stays as it was recorded. Where no query was recorded, the keys must be turned
alike and the scores be the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.relabel import are_apart
from kvdrift.pairing.scored import scores_by_place
from kvdrift.pairing.slots import SlotMatches, layers_of_two_forms, without_copies, without_spare_bits
from kvdrift.trace.model import Array, CacheRead, Trace
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
Place = tuple[int, int]  # layer, position

# What a row may be off by once it was turned back: rows that differ by more are others.
_NEAR = 1.0 / 16.0
# What is left of the whole difference at most, as where keys are put in order.
_LEFT_MOST = 1.0 / 8.0
# What stands in the frame of queries and keys.
IN_FRAMES = frozenset({Site.Q_ROPE, Site.K_ROPE, Site.K_CACHE})


@dataclass(frozen=True, slots=True)
class Turn:
    """How decode's queries and keys are turned back at one layer and position: `back` [kv head, dim, dim].

    `left` is what a row is still off by, at most: what the turn itself is rounded to.
    """

    back: Floats
    left: float

    def undone(self, rows: Array) -> Array:
        """Return rows [..., head, dim] or [feature] of queries or keys in prefill's frame, rounded to their dtype."""
        n_heads, dim = self.back.shape[:2]
        if rows.size % (n_heads * dim):
            return rows
        # The heads of a group lie beside each other, and rows of all heads behind one another.
        by_head = rows.astype(np.float64).reshape(-1, n_heads, _group(rows, n_heads, dim), dim)
        return np.asarray(np.einsum("rhgd,hde->rhge", by_head, self.back).reshape(rows.shape).astype(rows.dtype))


@dataclass(frozen=True, slots=True)
class Turns:
    """Where decode's queries and keys stand in another frame than prefill's, by layer and position."""

    by_place: Mapping[Place, Turn] = field(default_factory=dict)

    @property
    def layers(self) -> dict[int, float]:
        """The layers in which something is turned, each with what is left at most once it was turned back."""
        found: dict[int, float] = {}
        for (layer, _), turn in self.by_place.items():
            found[layer] = max(turn.left, found.get(layer, 0.0))
        return found

    @property
    def places(self) -> set[tuple[int | None, Site]]:
        """The layers and sites whose rows may have to be turned back."""
        return {(layer, site) for layer in self.layers for site in IN_FRAMES}

    def row(self, layer: int | None, site: Site, position: int, prefill: Array, decode: Array) -> Array:
        """Return decode's row in prefill's frame. A new key that is turned only where it is read stands there."""
        turn = None if layer is None or site not in IN_FRAMES else self.by_place.get((layer, position))
        if turn is None or prefill.shape != decode.shape or prefill.dtype != decode.dtype:
            return decode
        return turn.undone(decode) if are_apart(prefill, decode) else decode

    def read(self, decode: CacheRead, position: int) -> CacheRead:
        """Return decode's keys in prefill's frame, and other reads as they are."""
        turn = None if decode.site is not Site.K_CACHE else self.by_place.get((decode.layer, position))
        return decode if turn is None else replace(decode, rows=turn.undone(decode.rows))


def common_turns(prefill: Trace, decode: Trace, wanted: tuple[int, ...], left_out: Collection[int] = ()) -> Turns:
    """Return where decode's frame is another one than prefill's and how it is turned back, but in layers `left_out`."""
    apart = _apart(prefill, decode, wanted)
    for layer in (*layers_of_two_forms(prefill, decode), *left_out) if apart else ():
        apart = {place: queries for place, queries in apart.items() if place[0] != layer}
    if not apart:
        return Turns()
    matches = SlotMatches()
    reads = [_key_reads(trace, apart) for trace in (prefill, decode)]
    scores = [scores_by_place(trace, apart) for trace in (prefill, decode)]
    found = {}
    for place, queries in apart.items():
        if place not in reads[0] or place not in reads[1]:
            continue
        first, second = without_copies(reads[0][place], reads[1][place])
        rows = [scored.get(place) for scored in scores]
        match = matches.find(first.slots, second.slots, place[1], None if rows[0] is None else rows[0].seen)
        keys = first.rows[match.of_prefill], second.rows[match.of_decode]
        if match.n_lost or not len(keys[0]) or keys[0].shape != keys[1].shape:
            continue
        if queries is None and (rows[0] is None or rows[1] is None or not rows[0].distance(rows[1]) <= _NEAR):
            continue
        turn = _turn(queries, keys)
        if turn is not None:
            found[place] = turn
    return Turns(found)


def _group(rows: Array, n_heads: int, dim: int) -> int:
    """How many heads of `rows` belong to one kv head."""
    if rows.ndim >= 2 and rows.shape[-1] == dim:
        return int(rows.shape[-2]) // n_heads
    return int(rows.shape[-1]) // (n_heads * dim)


def _apart(prefill: Trace, decode: Trace, wanted: tuple[int, ...]) -> dict[Place, tuple[Array, Array] | None]:
    """The queries of both passes, where they differ by more than rounding may; None where new keys do and no query was
    recorded."""
    found: dict[Place, tuple[Array, Array] | None] = {}
    queries, keys = (
        [rows_by_place(trace, site, wanted) for trace in (prefill, decode)] for site in (Site.Q_ROPE, Site.K_ROPE)
    )
    for place in queries[0].keys() & queries[1].keys():
        first, second = without_spare_bits(queries[0][place], queries[1][place])
        if first.shape == second.shape and first.dtype == second.dtype and are_apart(first, second):
            found[place] = (first, second)
    for place in (keys[0].keys() & keys[1].keys()) - queries[0].keys() - queries[1].keys():
        first, second = keys[0][place], keys[1][place]
        if first.shape == second.shape and first.dtype == second.dtype and are_apart(first, second):
            found[place] = None
    return dict(sorted(found.items()))


def rows_by_place(trace: Trace, site: Site, wanted: tuple[int, ...]) -> dict[Place, Array]:
    """Return the rows of a site at the positions `wanted`, by layer and position."""
    return {
        (record.layer, position): record.values[index]
        for record in trace.rows
        if record.site is site and record.layer is not None
        for index, position in enumerate(record.positions)
        if position in wanted
    }


def _key_reads(trace: Trace, places: Mapping[Place, object]) -> dict[Place, CacheRead]:
    return {
        (layer, position): read
        for layer in sorted({layer for layer, _ in places})
        for read in trace.cache_reads(layer)
        if read.site is Site.K_CACHE
        for position in read.positions
        if (layer, position) in places
    }


def _turn(queries: tuple[Array, Array] | None, keys: tuple[Array, Array]) -> Turn | None:
    """The frame of decode's queries [.., feature] and keys [slot, head, dim], None if no one turns all of them."""
    _, n_heads, dim = keys[0].shape
    prefill, decode = (side.astype(np.float64).transpose(1, 0, 2) for side in keys)
    if queries is not None:
        if queries[0].size % (n_heads * dim):
            return None
        first, second = (side.astype(np.float64).reshape(n_heads, -1, dim) for side in queries)
        # Queries are made as large as keys, so that both count.
        size = [np.linalg.norm(rows, axis=(1, 2), keepdims=True) for rows in (first, prefill)]
        weight = np.divide(size[1], size[0], out=np.ones_like(size[0]), where=size[0] > 0.0)
        prefill = np.concatenate([first * weight, prefill], axis=1)
        decode = np.concatenate([second * weight, decode], axis=1)
    if not (np.isfinite(prefill).all() and np.isfinite(decode).all()):
        return None
    left, _, right = np.linalg.svd(decode.transpose(0, 2, 1) @ prefill)
    back = left @ right
    off, long = np.linalg.norm(decode @ back - prefill, axis=-1), np.linalg.norm(prefill, axis=-1)
    before = np.linalg.norm(decode - prefill, axis=-1)
    if (off > _NEAR * long).any() or np.linalg.norm(off) > _LEFT_MOST * np.linalg.norm(before):
        return None
    return Turn(back, float(np.divide(off, long, out=np.zeros_like(off), where=long > 0.0).max()))


__all__ = ["IN_FRAMES", "Turn", "Turns", "common_turns", "rows_by_place"]
