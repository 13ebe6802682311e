"""What is audited: a model in an engine, with a fault planted in it, a clean twin, or nothing at all."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from kvdrift.capture.prompts import Encode
from kvdrift.engines.base import LiveEngine
from kvdrift.errors import UsageError
from kvdrift_bench.models.prompt_sets import DEFAULT_SET
from kvdrift_bench.planted.facts import FaultFacts, Tally, TwinFacts
from kvdrift_bench.run.records import Place, SubjectKind

Planted = FaultFacts | TwinFacts


@dataclass(frozen=True, slots=True)
class Subject:
    """What is planted in the model while it is audited; nothing for a clean run."""

    kind: SubjectKind
    name: str
    prompts: str = DEFAULT_SET
    planted: Planted | None = None

    @property
    def fault(self) -> FaultFacts | None:
        """The fault, None for a clean twin and a clean run."""
        return self.planted if isinstance(self.planted, FaultFacts) else None


class Host(Protocol):
    """A model in an engine, into which something can be planted.

    `dtype` is the engine's name of the native precision, `attention` says how it attends; results carry both.
    """

    @property
    def name(self) -> str: ...
    @property
    def dtype(self) -> str: ...
    @property
    def attention(self) -> str: ...

    def faults(self) -> Sequence[FaultFacts]:
        """Return every fault that there is for this engine."""
        ...

    def twins(self) -> Sequence[TwinFacts]:
        """Return every clean twin."""
        ...

    def why_not(self, planted: Planted) -> str | None:
        """Why something cannot be planted here, None if it can."""
        ...

    def places(self, fault: FaultFacts) -> list[Place]:
        """Return the true first places of a fault that can be planted here."""
        ...

    def run(self, planted: Planted | None) -> AbstractContextManager[tuple[LiveEngine, Tally]]:
        """Open the engine with `planted` in it, and a counter of how often that is committed."""
        ...

    def encoder(self, engine: LiveEngine) -> Encode | None:
        """Return the tokenizer of an engine that `run` opened, None if the model has none."""
        ...


def choose_subjects(
    host: Host, *, faults: Sequence[str] | None, twins: bool, n_clean: int, n_sets: int = 1
) -> list[Subject]:
    """Return the clean runs, the clean twins and the faults; `faults` names some of them, None is all of them.

    Each fault is run on `n_sets` sets of prompts, each clean run on one of its own.

    Raises:
        UsageError: no fault has one of these names.
    """
    corpus = {fault.name: fault for fault in host.faults()}
    unknown = [name for name in faults or () if name not in corpus]
    if unknown:
        raise UsageError(f"there is no fault {unknown[0]!r}; known: {', '.join(sorted(corpus))}")
    return [
        *(Subject("clean", "clean", f"set_{index}") for index in range(n_clean)),
        *(Subject("twin", twin.name, planted=twin) for twin in (host.twins() if twins else ())),
        *(
            Subject("fault", name, f"set_{index}", corpus[name])
            for index in range(n_sets)
            for name in (corpus if faults is None else faults)
        ),
    ]
