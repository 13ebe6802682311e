"""What holds in most decoders: sums of the residual stream, attention of what was read, products.

An engine that breaks one of them at the first place where two engines part is the one that is off. Each law is checked
on the values of one engine alone, relative to them.

Sums are not a law of every model: some multiply what they add, norm it, or add positions to the embedding. There an
engine that leaves such a step out keeps the sum, and the right one breaks it. So a sum convicts only an engine that
keeps it in its other layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.replay.attention import Operands, attend
from kvdrift.versus.streams import PARTS
from kvdrift.versus.values import Floats, PassValues, relative
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site

_OF_THE_STREAM = frozenset({Site.LAYER_IN, *PARTS})


@dataclass(frozen=True, slots=True)
class Broken:
    """A law that does not hold at a place: by how much, relative, and in words."""

    place: Place
    size: float
    text: str


def check_laws(values: PassValues, place: Place, n_layers: int) -> Iterator[Broken]:
    """Yield how far the laws of a place are from being kept, the largest over positions, where any is known."""
    layer, site = place
    if place in values.products:
        name, error = values.products[place]
        yield Broken(place, error, f"its {site} ({name}) is not the product of its own input and its own weights")
    if layer is None:
        return
    if site in _OF_THE_STREAM:
        yield from _stream(values, place)
    elif site in (Site.K_CACHE, Site.V_CACHE):
        yield from _written(values, place, Place(layer, Site.K_ROPE if site is Site.K_CACHE else Site.V_PROJ))
    elif site in (Site.ATTN_CTX, Site.ATTN_OUT):
        yield from _attention(values, layer)


def kept_elsewhere(values: PassValues, place: Place, n_layers: int, is_broken: Callable[[Broken], bool]) -> bool:
    """Whether the law of a place of the residual stream is one of this engine: it keeps it in most other layers.

    True at all other places, whose laws hold in every decoder. False where no other layer was recorded.
    """
    if place.site not in _OF_THE_STREAM:
        return True
    # The first layer gets the embedding, which may be scaled or have positions added to it: no other layer does.
    if place.layer == 0 and place.site is Site.LAYER_IN:
        return False
    first = 1 if place.site is Site.LAYER_IN else 0
    others = [Place(layer, place.site) for layer in range(first, n_layers) if layer != place.layer]
    broken = [is_broken(item) for other in others for item in _stream(values, other)]
    return bool(broken) and sum(broken) * 2 < len(broken)


def _stream(values: PassValues, place: Place) -> Iterator[Broken]:
    """What a sum of the residual stream, or the input of a layer, is off by."""
    layer, site = place
    if layer is None:
        return
    if site is Site.LAYER_IN:
        before = Place(None, Site.EMBED_OUT) if layer == 0 else Place(layer - 1, Site.LAYER_OUT)
        yield from _same(values, place, before)
    else:
        left, right = PARTS[site]
        yield from _sum(values, place, Place(layer, left), Place(layer, right))


def _sum(values: PassValues, place: Place, left: Place, right: Place) -> Iterator[Broken]:
    errors = []
    for position, total in values.rows.get(place, {}).items():
        one, two = values.rows.get(left, {}).get(position), values.rows.get(right, {}).get(position)
        if one is None or two is None or not one.shape == two.shape == total.shape:
            return
        errors.append(relative(total, one + two))
    if errors:
        yield Broken(place, max(errors), f"its {place.site} is not {left.site} plus {right.site}")


def _same(values: PassValues, place: Place, before: Place) -> Iterator[Broken]:
    found = values.rows.get(place, {}), values.rows.get(before, {})
    errors = [relative(found[0][at], found[1][at]) for at in found[0].keys() & found[1].keys()]
    if errors:
        yield Broken(place, max(errors), f"its {place.site} is not what {before} handed on")


def _written(values: PassValues, place: Place, made: Place) -> Iterator[Broken]:
    errors = []
    for position, rows in values.rows.get(place, {}).items():
        new = values.rows.get(made, {}).get(position)
        if new is not None and len(rows) and new.size == rows[-1].size:
            errors.append(relative(new, rows[-1].reshape(-1)))
    if errors:
        yield Broken(place, max(errors), f"the row in its {place.site} is not its {made.site}")


def _attention(values: PassValues, layer: int) -> Iterator[Broken]:
    spec = values.attention.get(layer)
    if spec is None or spec.is_biased:
        return
    errors = []
    for position, context in values.rows.get(Place(layer, Site.ATTN_CTX), {}).items():
        query = values.rows.get(Place(layer, Site.Q_ROPE), {}).get(position)
        keys = values.rows.get(Place(layer, Site.K_CACHE), {}).get(position)
        rows = values.rows.get(Place(layer, Site.V_CACHE), {}).get(position)
        if query is None or keys is None or rows is None or query.size % keys.shape[2]:
            return
        operands = Operands(
            query.reshape(-1, keys.shape[2]),
            keys,
            rows,
            np.arange(position + 1 - len(keys), position + 1),
            position,
            spec,
        )
        made: Floats = attend(operands).context.reshape(-1)
        errors.append(relative(made, context))
    if errors:
        yield Broken(
            Place(layer, Site.ATTN_CTX),
            max(errors),
            "its attention is not that of the queries, keys and values it read",
        )
