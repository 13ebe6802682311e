"""In which layers contexts are those of a coarser kernel, and by what they are off there.

It merges parts of 16 bits, or takes operands of 8 bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site


@dataclass(slots=True)
class Merges:
    """What was found in one mode; a layer with an error of another kind, whose size is NaN, is none of them."""

    sizes: dict[int, float] = field(default_factory=dict)

    def note(self, layer: int, size: float) -> None:
        """Note by what the contexts of a layer are off in one pair of passes, relative to them."""
        known = self.sizes.get(layer, 0.0)
        self.sizes[layer] = math.nan if math.isnan(known + size) else max(known, size)

    def is_another(self, layer: int) -> bool:
        """Whether the contexts of a layer have an error of another kind."""
        return math.isnan(self.sizes.get(layer, 0.0))

    def behind(self, place: Place, mode: str, margin: float) -> float:
        """Return what a drift at a place may be at least: `margin` times what contexts in front of it are off by.

        With aligned inputs that holds to what the layer hands on, since the next one gets those of prefill; as
        designed it holds to the logits.
        """
        layers = self.noise
        if not layers:
            return 0.0
        layer, site = place
        if mode != Mode.KV_ALIGNED or layer is None:
            is_behind = place.forward_rank >= Place(min(layers), Site.ATTN_CTX).forward_rank
            return margin * max(layers.values()) if is_behind else 0.0
        if site is Site.LAYER_IN:
            return margin * layers.get(layer - 1, 0.0)
        is_behind = place.forward_rank >= Place(layer, Site.ATTN_CTX).forward_rank
        return margin * layers.get(layer, 0.0) if is_behind else 0.0

    @property
    def noise(self) -> Mapping[int, float]:
        """By layer, what contexts are off by."""
        return {layer: size for layer, size in self.sizes.items() if not math.isnan(size)}


__all__ = ["Merges"]
