"""The driver of a sweep: declares its cells or goes on with them, runs what is missing, and leaves the summary."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

import msgspec

from kvdrift.errors import UsageError
from kvdrift.report.schema import view_to_text
from kvdrift.report.schema.others import SweepView
from kvdrift.sweep.backend import Backend, Job, JobOutcome, Limits
from kvdrift.sweep.cells import CellState, SweepCell, expand
from kvdrift.sweep.files import reason_of
from kvdrift.sweep.page import render_page
from kvdrift.sweep.spec import SweepSpec
from kvdrift.sweep.store import SUMMARY, CellResult, Declared, SweepDirectory
from kvdrift.sweep.summary import alpha_of_a_cell, build_summary
from kvdrift.sweep.work import RUN_CELL, group_of

# With one of these a cell is finished, and is not run again.
FINISHED = {CellState.PASS, CellState.FAIL, CellState.INCONCLUSIVE, CellState.NOT_APPLICABLE}


class Watcher(Protocol):
    """Hears what runs and what ended."""

    def begin(self, finished: int, total: int) -> None:
        """Hear how many cells there are, and how many of them are finished already."""
        ...

    def started(self, cell: str, worker: str) -> None:
        """Hear that a cell runs."""
        ...

    def ended(self, cell: str, state: CellState) -> None:
        """Hear that a cell ended."""
        ...


def declare(spec: SweepSpec, out: str | Path) -> SweepDirectory:
    """Expand a spec and write its cells down.

    Raises:
        UsageError: the matrix is wrong, or the place cannot be written.
    """
    directory = SweepDirectory(out)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    directory.declare(Declared(spec=spec, cells=expand(spec), created=created))
    return directory


def run_sweep(directory: SweepDirectory, backend: Backend, limits: Limits, watcher: Watcher) -> SweepView:
    """Run the cells of a sweep that have no verdict yet.

    Raises:
        UsageError: another driver is at work, or the disk is full; what is finished stays.
    """
    with directory.driven():
        declared = directory.read()
        results = directory.results()
        done = {id for id, result in results.items() if result.state in FINISHED}
        for cell in declared.cells:
            if cell.why_not is not None and cell.id not in done:
                _keep(directory, CellResult(id=cell.id, state=CellState.NOT_APPLICABLE, reasons=(cell.why_not,)))
                done.add(cell.id)
        waiting = [cell for cell in declared.cells if cell.id not in done]
        watcher.begin(len(declared.cells) - len(waiting), len(declared.cells))
        _Driver(directory, watcher, len(declared.cells) - len(waiting)).run(
            backend, [_job(cell, declared, directory) for cell in waiting], limits
        )
        view = build_summary(declared, directory.results())
        try:
            directory.write(SUMMARY, view_to_text(view))
            directory.write("report.html", render_page(view))
        except OSError as error:
            raise UsageError(_full(directory, reason_of(error))) from error
    return view


def _job(cell: SweepCell, declared: Declared, directory: SweepDirectory) -> Job:
    return Job(
        id=cell.id,
        function=RUN_CELL,
        payload={
            "cell": msgspec.to_builtins(cell),
            "spec": msgspec.to_builtins(declared.spec),
            "alpha": alpha_of_a_cell(declared),
            "directory": str(directory),
        },
        group=group_of(cell),
        memory=cell.memory,
        cpus=cell.cpus,
        gpus=cell.gpus,
    )


class _Driver:
    def __init__(self, directory: SweepDirectory, watcher: Watcher, finished: int) -> None:
        self._directory = directory
        self._watcher = watcher
        self._running: dict[str, Any] = {}
        self._finished = finished
        self._n_ended = 0
        self._began = self._told = time.monotonic()

    def run(self, backend: Backend, jobs: list[Job], limits: Limits) -> None:
        """Run the jobs, and end at once when the disk is full."""
        outcomes = backend.run(jobs, limits, self._started)
        close: Callable[[], None] = getattr(outcomes, "close", lambda: None)
        try:
            for outcome in outcomes:
                self._ended(outcome)
                self._tell()
        finally:
            close()
        self._running.clear()
        self._tell(now=True)

    def _started(self, id: str, worker: str) -> None:
        self._running[id] = {"worker": worker, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        self._watcher.started(id, worker)
        self._tell()

    def _ended(self, outcome: JobOutcome) -> None:
        self._running.pop(outcome.id, None)
        if outcome.value is not None and "stop" in outcome.value:
            raise UsageError(_full(self._directory, outcome.value["stop"]))
        if outcome.value is None:
            result = CellResult(
                id=outcome.id, state=CellState.ERROR, reasons=(str(outcome.error),), seconds=round(outcome.seconds, 3)
            )
            _keep(self._directory, result)
        state = CellState.ERROR if outcome.value is None else CellState(outcome.value["state"])
        self._finished += 1
        self._n_ended += 1
        self._watcher.ended(outcome.id, state)

    def _tell(self, *, now: bool = False) -> None:
        if not now and time.monotonic() - self._told < self._directory.beat_s and self._n_ended:
            return
        self._told = time.monotonic()
        each = (self._told - self._began) / max(1, self._n_ended)
        try:
            self._directory.write_progress(self._running, finished=self._finished, seconds=each)
        except OSError as error:
            raise UsageError(_full(self._directory, reason_of(error))) from error


def _keep(directory: SweepDirectory, result: CellResult) -> None:
    try:
        directory.write_result(result)
    except OSError as error:
        raise UsageError(_full(directory, reason_of(error))) from error


def _full(directory: SweepDirectory, why: str) -> str:
    try:
        kept = f"{sum(result.state in FINISHED for result in directory.results().values())} finished cells are kept"
    except OSError:  # it cannot be read either, at this moment
        kept = "what is finished is kept"
    return f"cannot write to {directory}: {why}; {kept}. Make room, then go on with kvdrift sweep --resume {directory}"


__all__ = ["Watcher", "declare", "run_sweep"]
