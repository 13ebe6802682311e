"""The directory of a sweep: what was declared, one result a finished cell, the cells' run directories, the summary.

A result is written by the worker that made it, after its run directory is in its place, so that a finished cell is
never lost with the driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from kvdrift.errors import TraceError, UsageError
from kvdrift.sweep.cells import CellState, SweepCell
from kvdrift.sweep.files import StoreError, reason_of
from kvdrift.sweep.places import files_of
from kvdrift.sweep.spec import SweepSpec

DECLARED, PROGRESS, SUMMARY = "sweep.json", "progress.json", "summary.json"


class CellResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a cell ended. `report` is the path of its page in the sweep's directory; None if there is none."""

    id: str
    state: CellState
    verdict: str | None = None
    first_failure: str | None = None
    cause: str | None = None
    reasons: tuple[str, ...] = ()
    report: str | None = None
    seconds: float = 0.0


class Declared(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep is to hold: its spec and the cells that it was expanded to."""

    spec: SweepSpec
    cells: tuple[SweepCell, ...]
    created: str


class SweepDirectory:
    """A sweep in its directory.

    Args:
        place: a path, or `protocol://...` as fsspec takes it.
    """

    def __init__(self, place: str | Path) -> None:
        self._files = files_of(place)
        self.beat_s = self._files.beat_s

    def __str__(self) -> str:
        return self._files.name

    def declare(self, declared: Declared) -> None:
        """Make the directory and write down the cells.

        Raises:
            UsageError: it cannot be written, or holds something.
        """
        try:
            names = self._files.begin()
            if DECLARED in names:
                raise UsageError(f"{self} holds a sweep; go on with it (--resume {self}) or name another --out")
            if names:
                raise UsageError(f"--out {self} is not empty; name another directory")
            self._files.write(DECLARED, msgspec.json.encode(declared))
        except OSError as error:
            raise UsageError(
                f"cannot write to --out {self}: {reason_of(error)}; name a directory you may write to"
            ) from error

    def read(self) -> Declared:
        """Return what was declared.

        Raises:
            TraceError: it is not the directory of a sweep.
            UsageError: it lies in a place that cannot be reached.
        """
        try:
            return msgspec.json.decode(self._files.read(DECLARED), type=Declared)
        except StoreError as error:
            raise UsageError(
                f"cannot read {self}: {error}; check its name, its endpoint and its credentials"
            ) from error
        except (OSError, msgspec.DecodeError) as error:
            raise TraceError(f"{self} is not the directory of a sweep: {error}") from error

    def results(self) -> dict[str, CellResult]:
        """Return the results that are there, by cell; one that cannot be read counts as missing."""
        found = {}
        for data in self._files.read_all("results"):
            try:
                result = msgspec.json.decode(data, type=CellResult)
            except msgspec.DecodeError:
                continue
            found[result.id] = result
        return found

    def write_result(self, result: CellResult) -> None:
        """Write the result of a cell."""
        self._files.write(f"results/{result.id}.json", msgspec.json.encode(result))

    def cell(self, id: str) -> AbstractContextManager[Path]:
        """Yield a path for the run directory of a cell; it is in its place when the context ends without an error."""
        return self._files.filled(f"cells/{id}")

    def write_progress(self, running: dict[str, Any], *, finished: int, seconds: float) -> None:
        """Write what runs at this moment, for `kvdrift sweep status`."""
        state = {"running": running, "finished": finished, "seconds": seconds}
        self._files.write(PROGRESS, msgspec.json.encode(state))

    def read_progress(self) -> dict[str, Any]:
        """Return what ran when it was written last; empty if nothing was."""
        try:
            state: dict[str, Any] = msgspec.json.decode(self._files.read(PROGRESS))
        except (OSError, msgspec.DecodeError):
            return {"running": {}, "finished": 0, "seconds": 0.0}
        return state

    def write(self, name: str, text: str) -> None:
        """Write a file of the summary."""
        self._files.write(name, text.encode())

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Hold the directory as the one that drives the sweep.

        Raises:
            UsageError: another driver holds it, or it cannot be reached any more.
        """
        try:
            with ExitStack() as stack:
                try:
                    stack.enter_context(self._files.held())
                except BlockingIOError as error:
                    more = error.strerror if error.errno == 0 else ""
                    raise UsageError(f"a sweep is running in {self}{more}; see kvdrift sweep status {self}") from None
                yield
        except StoreError as error:
            raise UsageError(f"cannot read {self}: {error}; what is finished is kept, and --resume goes on") from error

    def is_driven(self) -> bool:
        """Whether a driver is at work."""
        return self._files.is_held()


__all__ = ["CellResult", "Declared", "SweepDirectory"]
