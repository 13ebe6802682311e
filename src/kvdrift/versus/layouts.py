"""Undoes what differs between engines and is no difference: the order of rotary pairs within a head.

Two orders are in use: halves (pair i is elements i and i + dim/2, as in transformers) and neighbours (2i and 2i + 1, as
in GGUF files of Llama models, whose weights were permuted for it). A dot product of a query with a key does not see it.
"""

from __future__ import annotations

import numpy as np

from kvdrift.versus.record import Side
from kvdrift.versus.values import Floats, PassValues, relative
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site

# Sites whose heads are rotated, or will be.
ROTATED = frozenset({Site.Q_PROJ, Site.K_PROJ, Site.Q_NORM, Site.K_NORM, Site.Q_ROPE, Site.K_ROPE, Site.K_CACHE})


def to_halves(value: Floats, dim: int) -> Floats:
    """Return `value` [..., heads * dim] or [slot, head, dim] of neighbouring pairs in the order of halves.

    >>> to_halves(np.array([0.0, 2.0, 1.0, 3.0]), 4).tolist()
    [0.0, 1.0, 2.0, 3.0]
    """
    pairs = value.reshape(-1, dim // 2, 2)
    return np.ascontiguousarray(np.swapaxes(pairs, 1, 2)).reshape(value.shape)


def unify(a: Side, b: Side) -> tuple[str, ...]:
    """Bring the rotary pairs of B into the order of A, layer by layer, and say what was done.

    A layer is reordered if that brings its keys, as the projection gives them, nearer than half of what they were.
    Equal functions are then equal to rounding, and unequal ones are left as they are.
    """
    turned = []
    for layer in sorted(
        {place.layer for item in b.prompts.values() for place in item.prefill.rows if place.layer is not None}
    ):
        dims = [item.prefill.heads[layer][1] for item in b.prompts.values() if layer in item.prefill.heads]
        if not dims or dims[0] % 2:
            continue
        if _fits(a, b, layer, dims[0]):
            turned.append(layer)
            for item in b.prompts.values():
                passes = [item.prefill, item.decode, *(each for pair in (item.changed or {}).values() for each in pair)]
                for values in passes:
                    _reorder(values, layer, dims[0])
    if not turned:
        return ()
    return (f"rotary pairs of B stand beside each other, and were brought into the order of A ({len(turned)} layers)",)


def _fits(a: Side, b: Side, layer: int, dim: int) -> bool:
    plain, moved = [], []
    for site in (Site.K_PROJ, Site.Q_PROJ, Site.K_ROPE, Site.Q_ROPE):
        place = Place(layer, site)
        for name in a.prompts.keys() & b.prompts.keys():
            ours, theirs = a.prompts[name].prefill.rows.get(place, {}), b.prompts[name].prefill.rows.get(place, {})
            for position in ours.keys() & theirs.keys():
                if theirs[position].size % dim == 0:
                    plain.append(relative(ours[position], theirs[position]))
                    moved.append(relative(ours[position], to_halves(theirs[position], dim)))
        if plain:
            break
    return bool(plain) and float(np.median(moved)) < 0.5 * float(np.median(plain))


def _reorder(values: PassValues, layer: int, dim: int) -> None:
    for site in ROTATED:
        rows = values.rows.get(Place(layer, site), {})
        for position, value in rows.items():
            rows[position] = to_halves(value, dim)
