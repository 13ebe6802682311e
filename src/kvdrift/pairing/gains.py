"""Gains of a norm that one pass multiplies into the weights behind it, and the other into the rows of the norm.

    W (g x) = (W diag(g)) x

A decode step may hold the weights of a norm in the matrices that read it. Its norm then gives rows without them: those
of prefill by one factor for each feature, the same at all positions. What comes out of the products is the same, so
decode's rows are multiplied by these factors before they are compared.

Nothing hides behind them: rows without gains have the size of a norm without weights, which no other factor leaves, and
the products behind are compared as ever. Where these change as well, the rows stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.relabel import are_apart
from kvdrift.trace.model import Array, Trace
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
At = tuple[int | None, Site]

# Norms, and what comes out of the products behind them: the first of these that both passes show.
_BEHIND: Mapping[Site, tuple[tuple[Site, ...], ...]] = {
    Site.ATTN_NORM_OUT: ((Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ), (Site.Q_ROPE, Site.ATTN_CTX)),
    Site.FFN_NORM_OUT: ((Site.MLP_OUT,),),
    Site.FINAL_NORM_OUT: ((Site.LOGITS,),),
}
NORMS = frozenset(_BEHIND)
# A row may be off from its gains by this share of itself, and all rows by this share of what the gains change.
_NEAR, _LEFT_MOST = 1.0 / 16.0, 1.0 / 8.0
# By so much the size of rows without gains may be off from that of a norm: an epsilon, and rounding.
_UNIT = 2.0**-6


def gains_of(prefill: Trace, decode: Trace, wanted: Sequence[int], known: Mapping[At, Floats]) -> dict[At, Floats]:
    """Return by what decode's rows of a norm have to be multiplied, feature by feature, at all `wanted` positions.

    One position tells nothing, since any two rows have such factors: there those count that are `known` from others.
    """
    places = {(row.layer, row.site) for row in prefill.rows if row.site in NORMS}
    found: dict[At, Floats] = {}
    for place in sorted(places, key=lambda place: (place[0] is None, place[0] or 0, place[1])):
        pairs = _pairs(prefill, decode, place, wanted)
        if len(pairs) < len(wanted) or not any(are_apart(*pair) for pair in pairs):
            continue
        gain = _gain(pairs) if len(wanted) > 1 else known.get(place)
        if gain is not None and _is_harmless(prefill, decode, place, wanted, gain):
            found[place] = gain
    return found


def multiplied(rows: Array, gain: Floats) -> Array:
    """Return a row times its gains, rounded to its dtype."""
    return np.asarray((rows.astype(np.float64) * gain.reshape(rows.shape)).astype(rows.dtype))


def _pairs(prefill: Trace, decode: Trace, place: At, wanted: Sequence[int]) -> list[tuple[Array, Array]]:
    sides = [_rows(trace, place, wanted) for trace in (prefill, decode)]
    both = sorted(sides[0].keys() & sides[1].keys())
    alike = [(sides[0][position].ravel(), sides[1][position].ravel()) for position in both]
    return [pair for pair in alike if pair[0].shape == pair[1].shape and pair[0].dtype == pair[1].dtype]


def _rows(trace: Trace, place: At, wanted: Sequence[int]) -> dict[int, Array]:
    return {
        position: record.values[index]
        for record in trace.rows
        if (record.layer, record.site) == place
        for index, position in enumerate(record.positions)
        if position in wanted
    }


def _gain(pairs: Sequence[tuple[Array, Array]]) -> Floats | None:
    """The factor of each feature that leads from decode's rows to those of prefill, None if none does, or if neither
    pass has the rows of a norm without weights."""
    first, second = (np.stack([pair[side].astype(np.float64) for pair in pairs]) for side in (0, 1))
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        return None
    if not any(bool((np.abs(np.sqrt(np.mean(rows**2, 1)) - 1.0) <= _UNIT).all()) for rows in (first, second)):
        return None
    size = np.sum(second**2, axis=0)
    if not (size > 0.0).all():
        return None
    gain = np.sum(first * second, axis=0) / size
    left = np.linalg.norm(first - gain * second, axis=1)
    if not bool((left <= _NEAR * np.linalg.norm(first, axis=1)).all()):
        return None
    return gain if np.sum(left**2) <= _LEFT_MOST**2 * np.sum((first - second) ** 2) else None


def _is_harmless(prefill: Trace, decode: Trace, place: At, wanted: Sequence[int], gain: Floats) -> bool:
    """Whether what comes out of the products behind a norm changes by less than an eighth of what the gains change."""
    layer, site = place
    room = min(_NEAR, _LEFT_MOST * float(np.sqrt(np.mean((gain - 1.0) ** 2))))
    for behind in _BEHIND[site]:
        pairs = [_pairs(prefill, decode, (layer, each), wanted) for each in behind]
        if all(len(each) == len(wanted) for each in pairs):
            return all(_distance(*pair) <= room for each in pairs for pair in each)
    return False


def _distance(prefill: Array, decode: Array) -> float:
    first, second = prefill.astype(np.float64), decode.astype(np.float64)
    size = float(np.linalg.norm(first))
    return float(np.linalg.norm(second - first)) / size if size > 0.0 else np.inf


__all__ = ["NORMS", "gains_of", "multiplied"]
