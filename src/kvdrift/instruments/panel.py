"""All instruments, in the order of the report."""

from __future__ import annotations

from kvdrift.instruments.asymmetry import Asymmetry
from kvdrift.instruments.base import Instrument
from kvdrift.instruments.bits import Bits
from kvdrift.instruments.cacheaudit import CacheAudit
from kvdrift.instruments.choice import Choices
from kvdrift.instruments.collective import Collectives
from kvdrift.instruments.control import Control
from kvdrift.instruments.directed import Replay
from kvdrift.instruments.freshness import Freshness
from kvdrift.instruments.ladder import Ladder
from kvdrift.instruments.native import Native
from kvdrift.instruments.newrows import NewRows
from kvdrift.instruments.noise import Noise
from kvdrift.instruments.products import Products
from kvdrift.instruments.recorded import Recorded
from kvdrift.instruments.rounded import RoundedScores
from kvdrift.instruments.router import Router
from kvdrift.instruments.selfnoise import SelfNoise
from kvdrift.instruments.unobserved import Unobserved

INSTRUMENTS: list[type[Instrument]] = [
    Bits,
    Ladder,
    Noise,
    RoundedScores,
    Native,
    NewRows,
    Products,
    Recorded,
    Replay,
    Collectives,
    CacheAudit,
    Asymmetry,
    SelfNoise,
    Router,
    Freshness,
    Unobserved,
    Control,
    Choices,
]


def new_instruments() -> tuple[Instrument, ...]:
    """Return one of each, which has seen nothing."""
    return tuple(kind() for kind in INSTRUMENTS)
