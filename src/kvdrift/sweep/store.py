"""The directory of a sweep: what was declared, one result a finished cell, the cells' run directories, the summary.

A result is written by the worker that made it, after its run directory is in its place, so that a finished cell is
never lost with the driver. Files are written whole or not at all.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from kvdrift.errors import TraceError, UsageError
from kvdrift.sweep.cells import CellState, SweepCell
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
    """A sweep on disk."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def declare(self, declared: Declared) -> None:
        """Make the directory and write down the cells.

        Raises:
            UsageError: it cannot be written, or holds something.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if (self.path / DECLARED).exists():
                raise UsageError(
                    f"{self.path} holds a sweep; go on with it (--resume {self.path}) or name another --out"
                )
            if any(self.path.iterdir()):
                raise UsageError(f"--out {self.path} is not empty; name another directory")
            (self.path / "results").mkdir()
            (self.path / "cells").mkdir()
            self._write(DECLARED, msgspec.json.encode(declared))
        except OSError as error:
            raise UsageError(
                f"cannot write to --out {self.path}: {error.strerror}; name a directory you may write to"
            ) from error

    def read(self) -> Declared:
        """Return what was declared.

        Raises:
            TraceError: it is not the directory of a sweep.
        """
        try:
            return msgspec.json.decode((self.path / DECLARED).read_bytes(), type=Declared)
        except (OSError, msgspec.DecodeError) as error:
            raise TraceError(f"{self.path} is not the directory of a sweep: {error}") from error

    def results(self) -> dict[str, CellResult]:
        """Return the results that are there, by cell; one that cannot be read counts as missing."""
        found = {}
        for file in (self.path / "results").glob("*.json"):
            try:
                result = msgspec.json.decode(file.read_bytes(), type=CellResult)
            except (OSError, msgspec.DecodeError):
                continue
            found[result.id] = result
        return found

    def write_result(self, result: CellResult) -> None:
        """Write the result of a cell."""
        self._write(f"results/{result.id}.json", msgspec.json.encode(result))

    def write_progress(self, running: dict[str, Any], *, finished: int, seconds: float) -> None:
        """Write what runs at this moment, for `kvdrift sweep status`."""
        state = {"running": running, "finished": finished, "seconds": seconds}
        self._write(PROGRESS, msgspec.json.encode(state))

    def read_progress(self) -> dict[str, Any]:
        """Return what ran when it was written last; empty if nothing was."""
        try:
            state: dict[str, Any] = msgspec.json.decode((self.path / PROGRESS).read_bytes())
        except (OSError, msgspec.DecodeError):
            return {"running": {}, "finished": 0, "seconds": 0.0}
        return state

    def write(self, name: str, text: str) -> None:
        """Write a file of the summary."""
        self._write(name, text.encode())

    def _write(self, name: str, data: bytes) -> None:
        path = self.path / name
        handle, part = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise

    @contextmanager
    def driven(self) -> Iterator[None]:
        """Hold the directory as the one that drives the sweep; the kernel lets go of a killed driver's hold.

        Raises:
            UsageError: another driver holds it.
        """
        handle = os.open(self.path, os.O_RDONLY)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(f"a sweep is running in {self.path}; see kvdrift sweep status {self.path}") from None
            yield
        finally:
            os.close(handle)

    def is_driven(self) -> bool:
        """Whether a driver is at work."""
        try:
            with self.driven():
                return False
        except UsageError:
            return True


__all__ = ["CellResult", "Declared", "SweepDirectory"]
