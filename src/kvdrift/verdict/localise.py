"""Where a mismatch begins: the earliest address in forward order that stands above its noise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvdrift.compare.drift import NO_LAYER
from kvdrift.instruments.ladder import Key
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site


def first_beyond(excess: Mapping[Key, float], prompts: Sequence[str]) -> Address | None:
    """Return the first address with an excess above 1: by layer and site, then by prompt, then by position.

    Layer and site come first because nothing in a causal model flows from a layer to one below it, at any position.
    """
    order = {name: rank for rank, name in enumerate(prompts)}
    addresses = [
        Address(prompt, position, None if layer == NO_LAYER else layer, Site(site))
        for (prompt, position, layer, site), value in excess.items()
        if not value <= 1.0
    ]
    return min(addresses, key=lambda a: (a.forward_rank, order.get(a.prompt, 0), a.position), default=None)
