"""The rows of a table of goals, measured in pieces that are kept, so that a run that was broken off goes on."""

from __future__ import annotations

import gc
import hashlib
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `values` are the repetitions, none where nothing was measured and `note` says why."""

    what: str
    measure: str
    limit: float
    values: Sequence[float] = ()
    unit: str = ""
    at_least: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal was measured and reached."""
        if not self.values:
            return False
        median = statistics.median(self.values)
        return median >= self.limit if self.at_least else median <= self.limit

    def line(self) -> str:
        """Return the row of the table."""
        goal = f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"
        if not self.values:
            return f"| {self.what} | {self.measure} | {goal} | | not measured: {self.note} |"
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g})" if len(self.values) > 1 else ""
        found = f"{statistics.median(self.values):.3g}{self.unit}{spread}"
        state = "met" if self.is_met else "falls short"
        return f"| {self.what} | {self.measure} | {goal} | {found} | {state}{f'; {self.note}' if self.note else ''} |"


@dataclass(frozen=True, slots=True)
class Piece:
    """Some rows that are measured together.

    Attributes:
        name: what `--pieces` calls it.
        measure: gives its rows, by the number of repetitions.
        rows: the same rows without values, for a table in which it was not measured.
        is_long: whether it takes many minutes, and runs with `--full` or by its name alone.
    """

    name: str
    measure: Callable[[int], list[Row]]
    rows: Sequence[Row]
    is_long: bool = False


class _Kept(msgspec.Struct, frozen=True):
    """The rows of a piece as they are kept, with the state of the code that they were measured at."""

    state: str
    seconds: float
    rows: list[Row] = field(default_factory=list)


class Kept:
    """Pieces that were measured, in a file."""

    def __init__(self, path: Path, state: str) -> None:
        self._path, self._state = path, state
        self._pieces = self._read()

    def _read(self) -> dict[str, _Kept]:
        data = self._path.read_bytes() if self._path.exists() else b"{}"
        return msgspec.json.decode(data, type=dict[str, _Kept])

    def is_known(self, piece: Piece) -> bool:
        """Whether a piece was measured at this state of the code."""
        return piece.name in self._pieces and self._pieces[piece.name].state == self._state

    def measure(self, piece: Piece, repeats: int) -> None:
        """Measure a piece and keep it at once."""
        began = time.perf_counter()
        rows = piece.measure(repeats)
        self._pieces = self._read()  # another run may have measured other pieces meanwhile
        self._pieces[piece.name] = _Kept(self._state, time.perf_counter() - began, rows)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_bytes(msgspec.json.encode(self._pieces))

    def rows(self, piece: Piece) -> list[Row]:
        """Return the rows of a piece: as they were measured last, or those without values."""
        return list(self._pieces[piece.name].rows) if piece.name in self._pieces else list(piece.rows)

    def stale(self, pieces: Sequence[Piece]) -> list[str]:
        """Return the names of pieces that were measured at another state of the code."""
        return [piece.name for piece in pieces if piece.name in self._pieces and not self.is_known(piece)]

    def seconds(self, pieces: Sequence[Piece]) -> float:
        """Return what measuring the pieces took."""
        return sum(self._pieces[piece.name].seconds for piece in pieces if piece.name in self._pieces)


def state_of(settings: Mapping[str, object]) -> str:
    """Return a name for the code that is measured, the machine and the settings: the same name, the same figures."""
    digest = hashlib.sha256(repr((sorted(settings.items()), platform.machine(), os.cpu_count())).encode())
    for path in sorted([*(_ROOT / "src").rglob("*.py"), *(_ROOT / "benchmarks").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def interleaved(repeats: int, first: Callable[[], float], second: Callable[[], float]) -> list[float]:
    """Seconds of `first` over those of `second`, run in turn; one more round before them warms up."""
    ratios = []
    for index in range(repeats + 1):
        gc.collect()
        over, under = first(), second()
        if index:
            ratios.append(over / under)
    return ratios


def timed(action: Callable[[], object]) -> float:
    """Return the processor time that an action took in this process, which other programs hardly change."""
    began = time.process_time()
    action()
    return time.process_time() - began
