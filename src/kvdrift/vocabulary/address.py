"""Where a value belongs: prompt, position, layer, site and, for some values, head."""

from __future__ import annotations

import re
from typing import NamedTuple

from kvdrift.vocabulary.sites import Site, forward_rank

_WRITTEN = re.compile(r"(.*) / pos (\d+)(?: / layer (\d+))? / (\w+)(?: / head (\d+))?", re.DOTALL)


class Place(NamedTuple):
    """A tensor of the forward pass, whatever the token: `layer` is None for the sites outside the layers.

    >>> str(Place(20, Site.K_CACHE)), str(Place(None, Site.LOGITS))
    ('layer 20 / k_cache', 'logits')
    """

    layer: int | None
    site: Site

    def __str__(self) -> str:
        return str(self.site) if self.layer is None else f"layer {self.layer} / {self.site}"

    @property
    def forward_rank(self) -> tuple[int, int]:
        """Sort key: where the place stands in forward order."""
        return forward_rank(self.layer, self.site)


# Where a value belongs in the passes of one prompt: layer, site, position. A bare tuple, since a run has a million.
Spot = tuple[int | None, Site, int]


class Address(NamedTuple):
    """One place in one forward pass.

    `position` counts tokens from 0 in the whole sequence. `layer` is None for the sites outside the layers
    (`embed_out`, `final_norm_out`, `logits`).

    >>> str(Address("p0_short", 3, 20, Site.K_CACHE))
    'p0_short / pos 3 / layer 20 / k_cache'
    """

    prompt: str
    position: int
    layer: int | None
    site: Site
    head: int | None = None

    def __str__(self) -> str:
        parts = [self.prompt, f"pos {self.position}"]
        if self.layer is not None:
            parts.append(f"layer {self.layer}")
        parts.append(str(self.site))
        if self.head is not None:
            parts.append(f"head {self.head}")
        return " / ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Address:
        """Return the address that `str` wrote; the name of a prompt may hold any text.

        >>> Address.parse("p / chunks of 2 / pos 3 / layer 20 / k_cache")
        Address(prompt='p / chunks of 2', position=3, layer=20, site=<Site.K_CACHE: 'k_cache'>, head=None)

        Raises:
            ValueError: it is not an address.
        """
        found = _WRITTEN.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r} is not an address")
        prompt, position, layer, site, head = found.groups()
        return cls(
            prompt,
            int(position),
            None if layer is None else int(layer),
            Site(site),
            None if head is None else int(head),
        )

    @property
    def place(self) -> Place:
        """The (layer, site) part."""
        return Place(self.layer, self.site)

    @property
    def forward_rank(self) -> tuple[int, int]:
        """Sort key of the (layer, site) part.

        Layers come before positions: in a causal model the values of layer n, at any position, never depend on a
        layer above n. The lowest faulty layer is therefore the origin, at whatever step it shows.
        """
        return forward_rank(self.layer, self.site)
