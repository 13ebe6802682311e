"""In which layers one pass merges parts of attention that are kept in 16 bits, and by what contexts are off there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field


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

    @property
    def noise(self) -> Mapping[int, float]:
        """By layer, what contexts are off by."""
        return {layer: size for layer, size in self.sizes.items() if not math.isnan(size)}


__all__ = ["Merges"]
