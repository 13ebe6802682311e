"""Rotations by a table that one pass keeps in float32: what queries and keys are off by where nothing else is wrong.

A kernel with a table of its own, or one that computes sines in float32, turns each pair of elements by an angle that is
rounded: position times frequency to a half of 2^-23 of itself, sine and cosine to 2^-24. No perturbed pass shows that,
since a constant does not change, and it is not noise of a pass. It is told by its shape: with z, z' the pairs of
elements of prefill and decode as complex numbers,

    z' = z (1 + e_p)    with one e_p for each pair p, the same for all heads of queries and keys of a token,

and e_p as large as float32 makes it, another for each pair. A common factor, an angle that is wrong by more, a head
that is wrong by itself and rows that are off otherwise are no such rotation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from kvdrift.pairing.turned import rows_by_place
from kvdrift.replay.turns import Complex, Floats, pairs_of
from kvdrift.trace.model import Array, PassPair
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

# Rows that are no further apart are of float64, or of what it rounds to in a deep model.
_NEAR = 2.0**-42
# e_p of a float32 table: a rounding of the frequency and one of the product turn by 2^-24 of the angle each, and sine
# and cosine have one of their own. The fastest pair turns by a radian a position. A table of pairs in which less than a
# 32nd of a rounding shows is none.
_MOST, _LEAST = 4.0 * UNIT_ROUNDOFF["float32"], UNIT_ROUNDOFF["float32"] / 32.0
# The share of the whole difference that the rotations of all pairs leave at most.
_LEFT_MOST = 1.0 / 8.0
# How far the e_p of the pairs lie apart, beside their size: those of a common factor do not.
_SPREAD = 0.5
# Of two heads, random differences leave seven tenths of themselves; one head alone is turned by any.
_FEWEST_HEADS = 2


def angles_off(pair: PassPair) -> Mapping[int, float]:
    """Return, by layer, what rows that a float32 table turned are off by at most, in the 2-norm of a row.

    Layers in which a query or key is off in another way are left out, as are those whose cache shows no keys
    [slot, head, dim] as wide as its queries' heads, and passes at another precision than float64. NaN and infinity are
    off in another way.
    """
    if pair.prefill.rung != "float64" or pair.decode.rung != "float64":
        return {}
    rows = [
        {site: rows_by_place(trace, site, pair.positions) for site in (Site.Q_ROPE, Site.K_ROPE)}
        for trace in (pair.prefill, pair.decode)
    ]
    dims = {read.layer: read.rows.shape[-1] for read in pair.decode.cache if read.site is Site.K_CACHE}
    found: dict[int, float] = {}
    others: set[int] = set()
    for place in sorted({place for known in rows[0].values() for place in known}):
        layer, position = place
        both = [(rows[0][site].get(place), rows[1][site].get(place)) for site in rows[0]]
        apart = [(first, second) for first, second in both if first is not None and second is not None]
        apart = [(first, second) for first, second in apart if not _are_near(first, second)]
        if apart and _are_turned(apart, dims.get(layer, 0), position):
            found[layer] = max(found.get(layer, 0.0), *(_distance(first, second) for first, second in apart))
        elif apart:
            others.add(layer)
    return {layer: size for layer, size in found.items() if layer not in others}


def _distance(prefill: Array, decode: Array) -> float:
    size = float(np.linalg.norm(prefill.astype(np.float64)))
    apart = float(np.linalg.norm(decode.astype(np.float64) - prefill.astype(np.float64)))
    return apart / size if size > 0.0 else np.inf


def _are_near(prefill: Array, decode: Array) -> bool:
    """Whether two rows are no further apart than float64 rounds, or cannot be compared here."""
    return prefill.shape != decode.shape or bool(np.array_equal(prefill, decode)) or _distance(prefill, decode) <= _NEAR


def _are_turned(rows: list[tuple[Array, Array]], dim: int, position: int) -> bool:
    """Whether one rotation of pairs, as a float32 table has it at `position`, leads from prefill's queries and keys,
    whose heads have `dim` elements, to decode's."""
    if dim < 2 or any(prefill.size % dim for prefill, _ in rows):
        return False
    first, second = (
        np.concatenate([pair[side].astype(np.float64).reshape(-1, dim) for pair in rows]) for side in (0, 1)
    )
    if len(first) < _FEWEST_HEADS or not (np.isfinite(first).all() and np.isfinite(second).all()):
        return False
    return any(
        _is_turn(prefill, decode, position) for prefill, decode in zip(_layouts(first), _layouts(second), strict=True)
    )


def _layouts(rows: Floats) -> Iterator[Complex]:
    """The pairs [head, pair] of elements of rows [head, dim] in each layout that models have, with what is not turned
    behind them, as pairs whose second element is 0."""
    dim = rows.shape[1]
    for rotated in (dim, dim // 2, dim // 4):
        if rotated < 2 or rotated % 2:
            continue
        for start in sorted({0, dim - rotated}):
            inside = np.arange(start, start + rotated)
            for halves in (True, False):
                yield np.hstack([pairs_of(rows[:, inside], rotated, halves), np.delete(rows, inside, axis=1) + 0j])


def _is_turn(prefill: Complex, decode: Complex, position: int) -> bool:
    power = np.sum(np.abs(prefill) ** 2, axis=0)
    change = decode - prefill
    turn = np.divide(np.sum(change * prefill.conj(), axis=0), power, out=np.zeros_like(power, complex), where=power > 0)
    sizes = np.abs(turn)
    size = float(np.sqrt(np.mean(sizes**2)))
    return (
        float(np.linalg.norm(change - prefill * turn)) <= _LEFT_MOST * float(np.linalg.norm(change))
        and bool((sizes <= _MOST * (1.0 + position)).all())
        and size >= _LEAST
        and float(np.std(turn)) >= _SPREAD * size
    )


__all__ = ["angles_off"]
