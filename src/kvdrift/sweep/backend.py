"""The small interface behind which cells run: jobs go in, outcomes come out as they end.

A job names a function, `package.module:function`, which is called with its payload and returns plain data. So anything
that falls into independent pieces can use a backend, not audits alone. The function itself leaves its result where it
belongs, so that nothing is lost with whoever waits for it.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """One piece of work.

    Attributes:
        id: its name, once among the jobs of a run.
        function: `package.module:function`; it takes the payload and returns what JSON can hold.
        payload: what JSON can hold.
        group: jobs of one group go to one worker where possible, so that it loads their model once.
        memory: bytes that it takes; None if unknown, and then it runs alone.
    """

    id: str
    function: str
    payload: dict[str, Any] = field(default_factory=dict)
    group: str = ""
    memory: int | None = 0
    cpus: float = 1.0
    gpus: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JobOutcome:
    """The end of a job: its value, or why there is none. `attempts` counts the workers that were given it."""

    id: str
    value: dict[str, Any] | None
    error: str | None = None
    seconds: float = 0.0
    attempts: int = 1
    worker: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a backend may use.

    Attributes:
        jobs: workers at a time; None for one a core.
        memory: bytes for all of them; None for what is free.
        timeout: seconds that a job may take; None for any time.
        retries: how often a job is begun again after its worker died.
    """

    jobs: int | None = None
    memory: int | None = None
    timeout: float | None = None
    retries: int = 1


class Backend(Protocol):
    """Runs jobs. `started` is told the id of each job and its worker as it begins."""

    def run(self, jobs: Sequence[Job], limits: Limits, started: Callable[[str, str], None]) -> Iterator[JobOutcome]:
        """Yield an outcome for every job, in the order in which they end; closing the iterator ends the workers."""
        ...


def call(function: str, payload: dict[str, Any]) -> dict[str, Any]:
    """Call the function of a job by its name."""
    module, _, name = function.partition(":")
    value: dict[str, Any] = getattr(importlib.import_module(module), name)(payload)
    return value
