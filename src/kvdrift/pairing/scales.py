"""By what the scores of one pass are multiplied beside the other, where that is a constant with fewer digits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

# How far a constant is off that has nine digits at least, or was rounded to float32. A smaller factor is as likely a
# fault of the least size that the ladder finds.
_LEAST, _MOST = 2.0**-32, 2.0 * UNIT_ROUNDOFF["float32"]
# How far apart the factors of one constant are, beside their size.
_SPREAD = 1.0 / 16.0


@dataclass(slots=True)
class Scales:
    """What was found in one mode: the least and the largest factor, minus 1, and by layer what contexts are off by.

    NaN, which stands for an error of another kind, is never one constant.
    """

    factors: list[float] = field(default_factory=list)
    off: dict[int, float] = field(default_factory=dict)

    def note(self, layer: int, factor: float, size: float) -> None:
        """Note the factor of one token, minus 1, and what its context is off by; a factor of 0 is none."""
        if factor != 0.0:
            self.factors.append(factor)
            self.off[layer] = max(size, self.off.get(layer, 0.0))

    @property
    def is_constant(self) -> bool:
        """Whether all factors are one, as far from 1 as a constant with fewer digits is."""
        if not self.factors:
            return False
        middle = sum(self.factors) / len(self.factors)
        is_one = all(abs(factor - middle) <= _SPREAD * abs(middle) for factor in self.factors)
        return is_one and _LEAST <= abs(middle) <= _MOST

    @property
    def noise(self) -> Mapping[int, float]:
        """By layer, what contexts are off by; nothing where the factors are no constant."""
        return self.off if self.is_constant else {}


__all__ = ["Scales"]
