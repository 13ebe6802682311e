"""The list of the faults, which the other modules of this package fill."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass

from kvdrift_bench.planted.torch.model import Plant
from kvdrift_bench.planted.torch.ways import Way, planted

LAYER = 1


@dataclass(frozen=True, slots=True)
class Untuned:
    """One fault: the architecture that carries it, and the causes that are right for it."""

    name: str
    architecture: str
    plant: Plant
    right: frozenset[str]

    @property
    def is_seen(self) -> bool:
        """Whether the catalogue was extended with a look at this fault; a coin of its name."""
        return zlib.crc32(self.name.encode()) % 2 == 0


FAULTS: dict[str, Untuned] = {}


def fault(*right: str, of: str = "llama") -> Callable[[Way], Way]:
    """Return a decorator that keeps a way of planting as a fault of an architecture, with the causes right for it."""

    def register(way: Way) -> Way:
        name = way.__name__
        FAULTS[name] = Untuned(name, of, planted(way, fault_layer=LAYER), frozenset(right))
        return way

    return register
