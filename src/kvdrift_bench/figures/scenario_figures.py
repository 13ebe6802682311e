"""What the matrix of faults and scenarios shows: which scenario finds what, and what it alone finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what runs the matrix loads torch, and figures of llama.cpp are made without it
    from kvdrift_bench.run.scenario_runs import Cell, MatrixRow

_CLEAN_MARKS = {"EXACT": "=", "STRUCTURAL_DRIFT": "·", "MISMATCH": "**M**", "INCONCLUSIVE": "?"}

ENOUGH = 2  # faults that a scenario must find alone to earn its place


@dataclass(slots=True)
class ScenarioFigures:
    """One scenario over all runs.

    Attributes:
        made_for: faults that were made for it.
        found: faults that it finds; `alone` those that no other scenario finds, plain decode included.
        missed: faults made for it that it does not find at their address.
        clean: how many clean models it passes; `alarms` those on which it says MISMATCH or INCONCLUSIVE.
        does_not_apply: clean models to which it does not apply, by reason.
    """

    name: str
    made_for: list[str] = field(default_factory=list)
    found: list[str] = field(default_factory=list)
    alone: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)
    alarms: dict[str, str] = field(default_factory=dict)
    does_not_apply: dict[str, list[str]] = field(default_factory=dict)

    @property
    def applies(self) -> bool:
        """Whether it ran at all, on any clean model."""
        return bool(self.clean or self.alarms)


@dataclass(frozen=True, slots=True)
class Matrix:
    """All runs, and the figures of each scenario in the order of the catalogue."""

    rows: Sequence[MatrixRow]
    scenarios: dict[str, ScenarioFigures]

    @property
    def faults(self) -> list[MatrixRow]:
        return [row for row in self.rows if row.kind == "fault"]

    @property
    def clean(self) -> list[MatrixRow]:
        return [row for row in self.rows if row.kind == "clean"]

    @property
    def wanting(self) -> list[ScenarioFigures]:
        """Scenarios that apply somewhere and find fewer than two faults alone."""
        return [item for item in self.scenarios.values() if item.applies and len(item.alone) < ENOUGH]


def finders(row: MatrixRow, clean: MatrixRow | None) -> list[str]:
    """Return the scenarios that find the fault of a row: those that say MISMATCH, unless they say the same, at the same
    address, of the model without the fault."""
    cells = {} if clean is None else clean.cells
    return [
        name
        for name, cell in row.cells.items()
        if cell.is_mismatch and not (name in cells and cells[name].is_mismatch and cells[name].address == cell.address)
    ]


def build_matrix(rows: Sequence[MatrixRow]) -> Matrix:
    """Count what each scenario finds."""
    names = list(dict.fromkeys(name for row in rows for name in row.cells))
    figures = {name: ScenarioFigures(name) for name in names}
    clean = {row.model: row for row in rows if row.kind == "clean"}
    for row in rows:
        if row.kind == "clean":
            _count_clean(row, figures)
            continue
        found = finders(row, clean.get(row.model))
        for name in found:
            figures[name].found.append(row.name)
        if len(found) == 1:
            figures[found[0]].alone.append(row.name)
        if row.needs is not None:
            own = figures.setdefault(row.needs, ScenarioFigures(row.needs))
            own.made_for.append(row.name)
            cell = row.cells.get(row.needs)
            if row.needs not in found or cell is None or not cell.right:
                own.missed.append(row.name)
    return Matrix(rows, figures)


def _count_clean(row: MatrixRow, figures: dict[str, ScenarioFigures]) -> None:
    for name, cell in row.cells.items():
        if cell.verdict is None:
            figures[name].does_not_apply.setdefault(cell.reason, []).append(row.model)
        elif cell.verdict in ("MISMATCH", "INCONCLUSIVE"):
            figures[name].alarms[row.model] = cell.verdict
        else:
            figures[name].clean.append(row.model)


def fault_mark(cell: Cell | None, found: bool) -> str:
    """Return the mark of a scenario on a model with a fault, which it finds or not; empty where it does not apply."""
    if cell is None or cell.verdict is None:
        return ""
    if cell.is_mismatch:
        return ("**X**" if cell.right else "x") if found else "o"
    return "?" if cell.verdict == "INCONCLUSIVE" else "·"


def clean_mark(cell: Cell | None) -> str:
    """Return the mark of a scenario on a model without a fault; empty where it does not apply."""
    return "" if cell is None or cell.verdict is None else _CLEAN_MARKS[cell.verdict]
