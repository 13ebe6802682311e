"""By what the scores of one pass are multiplied beside the other, where that is a constant with fewer digits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

# How far a constant is off that has nine digits at least, or was rounded to float32. A smaller factor is as likely a
# fault of the least size that the ladder finds.
_LEAST, _MOST = 2.0**-32, 2.0 * UNIT_ROUNDOFF["float32"]
# Unless it is log2(e) with so many decimals.
_LOG2_E, _DECIMALS = math.log2(math.e), range(9, 13)
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
        return is_one and (_LEAST <= abs(middle) <= _MOST or _is_of_digits(middle))

    @property
    def noise(self) -> Mapping[int, float]:
        """By layer, what contexts are off by; nothing where the factors are no constant."""
        return self.off if self.is_constant else {}


def _is_of_digits(factor: float) -> bool:
    """Whether log2(e) makes this factor, minus 1, if it is written with fewer digits, rounded or cut off."""
    written = (way(_LOG2_E * 10.0**n) / 10.0**n / _LOG2_E - 1.0 for n in _DECIMALS for way in (math.floor, math.ceil))
    return any(abs(abs(factor) - abs(off)) <= _SPREAD * abs(off) for off in written)


__all__ = ["Scales"]
