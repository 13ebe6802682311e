"""What an instrument is: it sees recorded pairs, judges a mode of a run, and says what it saw.

Adding an instrument is a file in this folder and a line in `kvdrift.instruments.panel`; docs/adding/instrument.md
shows one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

from kvdrift.instruments.route import Route
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import FloorTable
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import Offset, RecordedPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Caveat, Evidence
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode
from kvdrift.vocabulary.precision import COARSEST, Arithmetic
from kvdrift.vocabulary.scope import Scope
from kvdrift.vocabulary.units import Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Foreign:
    """What is known of traces that kvdrift did not capture itself.

    `computed_in` is the dtype that the engine computes in, None if unknown, and `plausible` the coarsest that its
    values allow; `remarks` become caveats; `gaps` say what the files lack so that no pass can be given, and `sampled`
    that they lack a part of each tensor; `missing` says by mode why the files hold nothing of it; `offsets` are decode
    passes that count positions otherwise than prefill does.
    """

    computed_in: str | None
    n_layers: int
    plausible: str = COARSEST
    sampled: str | None = None
    remarks: tuple[Caveat, ...] = ()
    gaps: tuple[str, ...] = ()
    missing: Mapping[str, str] = field(default_factory=dict)
    offsets: tuple[Offset, ...] = ()

    @property
    def arithmetic(self) -> Arithmetic:
        """How the engine rounds; as the coarsest dtype that its values allow where it is not known."""
        return Arithmetic(self.computed_in or self.plausible)


@dataclass(frozen=True, slots=True)
class QuantisedRows:
    """The rows of a cache of `kind` that are quantised from equal inputs: those of the first `n_first` tokens."""

    kind: str
    n_first: int


class Run(Protocol):
    """What an instrument may know of a run; `kvdrift.measure.measured.Measured` is one."""

    @property
    def plan(self) -> AuditPlan: ...
    @property
    def info(self) -> EngineFacts: ...
    @property
    def prompts(self) -> Sequence[Prompt]: ...
    @property
    def modes(self) -> tuple[Mode, ...]: ...
    @property
    def table(self) -> DriftTable: ...
    @property
    def floors(self) -> FloorTable: ...
    @property
    def routes(self) -> Sequence[Route]: ...
    @property
    def plants(self) -> Sequence[Plant]: ...
    @property
    def control_mode(self) -> Mode | None: ...
    @property
    def foreign(self) -> Foreign | None: ...
    @property
    def scope(self) -> Scope: ...
    @property
    def choices(self) -> Mapping[str, str]: ...
    @property
    def quantised(self) -> Mapping[str, QuantisedRows]: ...
    @property
    def is_specified(self) -> bool: ...
    @property
    def probed_tokens(self) -> Mapping[str, tuple[int, ...]]: ...
    @property
    def repeated_units(self) -> frozenset[Unit]: ...


@dataclass(frozen=True, slots=True)
class Directed:
    """A cause that was found.

    Attributes:
        layer: the lowest layer that it is seen in, None outside the layers.
        size: its coefficient, in the unit of the cause; of a factor, how far it is from 1.
        interval: two standard errors to each side of `size`.
        p_value: adjusted for all tests; None where a bound decided.
        address: where it is first seen.
        explained: the share of the squared difference that it removes, most of the rest being rounding.
    """

    cause: Cause
    layer: int | None
    size: float
    interval: tuple[float, float]
    p_value: float | None
    address: Address
    explained: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What an instrument saw in one mode, or in the whole run.

    Attributes:
        evidence: for the report, in order; empty where there was nothing to look at.
        begins: addresses at which something beyond noise begins; the first in forward order of all instruments is the
            first failure at the native dtype.
        beyond: addresses beyond noise each by itself: what shows only over many (prompt, position) pairs together is
            not among them.
        causes: causes that it named.
        n_pairs: pairs that it judged, 0 if it does not count them.
        found: what other instruments and the report read beside that.
    """

    evidence: tuple[Evidence, ...] = ()
    begins: tuple[Address, ...] = ()
    beyond: tuple[Address, ...] = ()
    causes: tuple[Directed, ...] = ()
    n_pairs: int = 0
    found: object = None


NOTHING = Seen()
T = TypeVar("T")
Judges = Literal["mode", "run", "verdict"]


class Instrument(Protocol):
    """One way to look at a run.

    `name` identifies it. `judges` says what it judges: each "mode" by itself, the "run" as a whole, or the "verdict"
    that the others came to.
    """

    name: ClassVar[str]
    judges: ClassVar[Judges]

    def see(self, item: RecordedPair, run: Run) -> None:
        """Take in one recorded pair, which the drift table of `run` holds already."""
        ...

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Say what was seen; `mode` is "" for the run as a whole. `panel` knows what other instruments saw."""
        ...


@runtime_checkable
class Exact(Protocol):
    """Findings that know where products were measured, and at which addresses their terms cancel to less than their own
    rounding."""

    @property
    def cancelling(self) -> frozenset[Address]: ...

    @property
    def places(self) -> frozenset[Place]: ...


class Replayed(NamedTuple):
    """The contexts that were replayed with operands of 8 bits, and are judged against those."""

    addresses: frozenset[Address]


@runtime_checkable
class Tentative(Protocol):
    """An instrument that says of each pair, before it judges the run, what looks beyond its bounds: the values there
    are then kept for a diagnosis."""

    def suspected(self, pair: PassPair, run: Run) -> Sequence[Address]:
        """Return the addresses of the pair just seen that are beyond the bounds which it sets by itself.

        More pairs only widen bounds, so that none of its addresses that will be beyond is missing.
        """
        ...


class Blind:
    """An instrument that reads the drift table alone, and needs no look at the pairs themselves."""

    def see(self, item: RecordedPair, run: Run) -> None:
        """Ignore the pair."""


@dataclass(slots=True)
class Panel:
    """All instruments in front of one run; each judges a mode once."""

    run: Run
    instruments: Sequence[Instrument]
    _seen: dict[tuple[str, str], Seen] = field(default_factory=dict, repr=False)

    def seen(self, name: str, mode: str = "") -> Seen:
        """Return what the instrument `name` saw in `mode`, "" for the run as a whole."""
        if (name, mode) not in self._seen:
            instrument = next(item for item in self.instruments if item.name == name)
            self._seen[name, mode] = instrument.judge(self.run, mode, self)
        return self._seen[name, mode]

    def instrument(self, kind: type[T]) -> T:
        """Return the instrument of a class."""
        return instrument_of(self.instruments, kind)

    def of_mode(self, mode: str) -> dict[str, Seen]:
        """Return what every instrument of modes saw in one, in the order of the report."""
        return {item.name: self.seen(item.name, mode) for item in self.instruments if item.judges == "mode"}

    def of_run(self) -> dict[str, Seen]:
        """Return what every instrument of the run as a whole saw, in the order of the report."""
        return {item.name: self.seen(item.name) for item in self.instruments if item.judges == "run"}


def instrument_of(instruments: Sequence[Instrument], kind: type[T]) -> T:
    """Return the instrument of a class among several."""
    return next(item for item in instruments if isinstance(item, kind))


def share_of_alpha(run: Run) -> float:
    """Return the alpha of one test. Tests that can each raise an alarm share it: the directed ones, in both modes where
    there is no ladder, and the asymmetry."""
    n_tests = len(run.modes) if run.plan.ladder == "off" else 1 + run.is_specified
    return run.plan.alpha / max(1, n_tests)
