"""A scale of scores that one pass multiplies into its queries or keys, and the other into their products.

Attention takes nothing from queries and keys but their products times the scale. A decode kernel may hold the scale, or
its root, in its queries, in the weights that make them, or in its keys, and multiply the products by what is left:

    q' = a q   and   k' = b k    for all heads, tokens and keys of a layer, with the same scores.

A factor of each query head, such as a temperature, may stand in the queries in the same way.

Decode's rows are then divided by a and b before they are compared. Where the scores change with the queries, the factor
is a difference of the two passes and nothing is divided; where they change less, what is left shows in the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.reads import reads_of
from kvdrift.pairing.relabel import are_apart
from kvdrift.pairing.scored import scores_by_place
from kvdrift.pairing.slots import SlotMatches, layers_of_two_forms, without_copies, without_spare_bits
from kvdrift.pairing.turned import rows_by_place
from kvdrift.trace.model import Array, CacheRead, Trace
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
Place = tuple[int, int]  # layer, position

# A row may be off from the factor by this share of itself, and all rows by this share of what the factor changes.
_NEAR, _LEFT_MOST = 1.0 / 16.0, 1.0 / 8.0
# What a factor of queries, or of keys, stands at.
_QUERIES = frozenset({Site.Q_PROJ, Site.Q_NORM, Site.Q_ROPE})
_KEYS = frozenset({Site.K_PROJ, Site.K_NORM, Site.K_ROPE, Site.K_CACHE})


class Fold(NamedTuple):
    """By what decode's queries and keys of a layer are multiplied, beside those of prefill; 1 where they are not.

    `heads` are the factors of query heads where these have one each, and `query` their mean; else there are none.
    """

    query: float = 1.0
    key: float = 1.0
    heads: tuple[float, ...] = ()

    @property
    def product(self) -> Floats | float:
        """By what products of queries and keys are multiplied, [head, 1] or for all heads: the scale behind them is
        divided by it."""
        return self.key * (np.array(self.heads)[:, None] if self.heads else self.query)

    @property
    def change(self) -> float:
        """What the factors change of scores, relative to them; over heads in the root mean square."""
        return float(np.sqrt(np.mean(np.square(np.asarray(self.product) - 1.0))))

    def divided(self, site: Site, rows: Array) -> Array:
        """Return rows [..., feature] of a site divided by their factor, rounded to their dtype."""
        if not self.heads or site not in _QUERIES:
            return _divided(rows, self.of(site))
        by_head = rows.astype(np.float64).reshape(len(self.heads), -1) / np.array(self.heads)[:, None]
        return np.asarray(by_head.reshape(rows.shape).astype(rows.dtype))

    def of(self, site: Site) -> float:
        """By what the rows of a site may be multiplied."""
        return self.query if site in _QUERIES else self.key if site in _KEYS else 1.0


@dataclass(frozen=True, slots=True)
class Folds:
    """The layers in which decode holds a part of the scale in its queries or keys."""

    by_layer: Mapping[int, Fold] = field(default_factory=dict)

    @property
    def places(self) -> set[tuple[int | None, Site]]:
        """The layers and sites whose rows may have to be divided."""
        return {(layer, site) for layer, fold in self.by_layer.items() for site in Site if fold.of(site) != 1.0}

    def row(self, layer: int | None, site: Site, prefill: Array, decode: Array) -> Array:
        """Return decode's row divided by its factor, where it has it, rounded to its dtype."""
        fold = None if layer is None else self.by_layer.get(layer)
        if fold is None or fold.of(site) == 1.0 or prefill.shape != decode.shape or prefill.dtype != decode.dtype:
            return decode
        divided = fold.divided(site, decode)
        is_apart = bool(fold.heads) or are_apart(prefill, decode)
        return divided if is_apart and not are_apart(prefill, divided) else decode

    def read(self, decode: CacheRead) -> CacheRead:
        """Return decode's keys divided by their factor, and other reads as they are."""
        fold = self.by_layer.get(decode.layer)
        if fold is None or fold.of(decode.site) == 1.0:
            return decode
        return CacheRead(
            decode.layer, decode.site, decode.positions, decode.slots, _divided(decode.rows, fold.of(decode.site))
        )


def folds_of(prefill: Trace, decode: Trace, wanted: Sequence[int]) -> Folds:
    """Return in which layers decode's queries, and maybe its keys, hold a part of the scale at all `wanted` positions.

    A layer whose queries and keys are near those of prefill, whose scores were recorded in one pass alone, or whose
    rows hold a NaN or an infinity, is left out.
    """
    with_scores = [{row.layer for row in trace.rows if row.site is Site.ATTN_SCORES} for trace in (prefill, decode)]
    if not (told := with_scores[0] & with_scores[1]):
        return Folds()  # two million pairs of rows without scores are not compared for nothing
    queries = {place: pair for place, pair in _queries(prefill, decode, wanted).items() if place[0] in told}
    in_two_forms = layers_of_two_forms(prefill, decode) if queries else frozenset()
    found = {}
    for layer in sorted({layer for layer, _ in queries} - set(in_two_forms)):
        rows = {position: pair for (at, position), pair in queries.items() if at == layer}
        keys = _keys(prefill, decode, layer, tuple(rows))
        fold = Fold(_factor([*rows.values()]) or 0.0, _factor(keys) or 0.0)
        if not fold.query and fold.key:
            heads = _factors_of_heads([*rows.values()], _n_heads(decode, layer))
            fold = fold._replace(query=float(np.mean(heads)) if heads else 0.0, heads=heads)
        if fold.query and fold.key and fold != Fold() and _are_same_scores(prefill, decode, layer, tuple(rows), fold):
            found[layer] = fold
    return Folds(found)


def _divided(rows: Array, factor: float) -> Array:
    return np.asarray((rows.astype(np.float64) / factor).astype(rows.dtype))


def _queries(prefill: Trace, decode: Trace, wanted: Sequence[int]) -> dict[Place, tuple[Array, Array]]:
    """The queries of both passes by place, of the layers in which some of them are apart."""
    sides = [rows_by_place(trace, Site.Q_ROPE, tuple(wanted)) for trace in (prefill, decode)]
    both = {place: without_spare_bits(sides[0][place], sides[1][place]) for place in sides[0].keys() & sides[1].keys()}
    alike = {place: pair for place, pair in both.items() if pair[0].shape == pair[1].shape}
    apart = {layer for (layer, _), pair in alike.items() if are_apart(*pair)}
    return {place: pair for place, pair in sorted(alike.items()) if place[0] in apart}


def _keys(prefill: Trace, decode: Trace, layer: int, wanted: tuple[int, ...]) -> list[tuple[Array, Array]]:
    """The keys [slot, head, dim] that both passes read in a layer, in prefill's order, one pair a position."""
    reads = [reads_of(trace, layer, Site.K_CACHE, wanted) for trace in (prefill, decode)]
    matches, found = SlotMatches(), []
    for position in sorted(reads[0].keys() & reads[1].keys()):
        first, second = without_copies(reads[0][position], reads[1][position])
        match = matches.find(first.slots, second.slots, position, None)
        keys = first.rows[match.of_prefill], second.rows[match.of_decode]
        if not match.n_lost and len(keys[0]) and keys[0].shape == keys[1].shape:
            found.append(keys)
    return found


def _factor(pairs: Sequence[tuple[Array, Array]]) -> float | None:
    """The one factor that leads from prefill's rows [.., feature] to decode's; 1 where none are apart, None if none
    does."""
    if not pairs:
        return None
    if not any(are_apart(*pair) for pair in pairs):
        return 1.0
    found = _fitted(pairs)
    return None if found is None or not found.left <= _LEFT_MOST**2 * found.changed else found.factor


class _Fitted(NamedTuple):
    """A factor, and the squared difference of all rows with and without it."""

    factor: float
    left: float
    changed: float


def _fitted(pairs: Sequence[tuple[Array, Array]]) -> _Fitted | None:
    """The factor that lies nearest, None where a row is off from it, or is not finite."""
    along = total = 0.0
    for prefill, decode in pairs:
        first, second = prefill.astype(np.float64).ravel(), decode.astype(np.float64).ravel()
        along, total = along + float(first @ second), total + float(first @ first)
    if not (np.isfinite(along) and total > 0.0 and along > 0.0):
        return None
    factor = along / total
    left = changed = 0.0
    for prefill, decode in pairs:
        first, second = prefill.astype(np.float64), decode.astype(np.float64)
        off = np.linalg.norm(second - factor * first, axis=-1)
        if not bool((off <= _NEAR * factor * np.linalg.norm(first, axis=-1)).all()):
            return None
        left, changed = left + float(np.sum(off**2)), changed + float(np.sum((second - first) ** 2))
    return _Fitted(factor, left, changed)


def _n_heads(trace: Trace, layer: int) -> int:
    """The number of query heads, by the scores [head, key] of a layer; 0 if none are known."""
    at = (row.values for row in trace.rows if row.site is Site.ATTN_SCORES and row.layer == layer)
    return next((values.shape[1] for values in at if values.ndim == 3), 0)


def _factors_of_heads(pairs: Sequence[tuple[Array, Array]], n_heads: int) -> tuple[float, ...]:
    """The factor of each head that leads from prefill's queries [feature] to decode's; none if one has none."""
    if n_heads < 2 or any(first.size % n_heads for first, _ in pairs):
        return ()
    by_head = [tuple(rows.reshape(n_heads, -1) for rows in pair) for pair in pairs]
    found = [_fitted([(first[head], second[head]) for first, second in by_head]) for head in range(n_heads)]
    fitted = [each for each in found if each is not None]
    left, changed = (sum(each[at] for each in fitted) for at in (1, 2))
    is_one = len(fitted) == n_heads and left <= _LEFT_MOST**2 * changed
    return tuple(each.factor for each in fitted) if is_one else ()


def _are_same_scores(prefill: Trace, decode: Trace, layer: int, wanted: tuple[int, ...], fold: Fold) -> bool:
    """Whether scores, up to a constant of each head, change by less than an eighth of what the factor would change."""
    first, second = (scores_by_place(trace, {(layer, position) for position in wanted}) for trace in (prefill, decode))
    gross = fold.change
    room = _NEAR if gross <= _NEAR else min(_NEAR, _LEFT_MOST * gross)
    places = [(layer, position) for position in wanted]
    return all(place in first and place in second and first[place].distance(second[place]) <= room for place in places)


__all__ = ["Fold", "Folds", "folds_of"]
