"""The matrix of faults and scenarios as Markdown."""

from __future__ import annotations

from collections.abc import Mapping

from kvdrift_bench.figures.markdown import table
from kvdrift_bench.figures.scenario_figures import Matrix, ScenarioFigures, finders
from kvdrift_bench.run.scenario_runs import Cell, MatrixRow

_AT, _ELSEWHERE, _AS_WITHOUT, _UNSURE, _QUIET = "**X**", "x", "o", "?", "·"
_LETTERS = {"EXACT": "=", "STRUCTURAL_DRIFT": "·", "MISMATCH": "**M**", "INCONCLUSIVE": "?"}


def render(matrix: Matrix, command: str, facts: Mapping[str, str]) -> str:
    """Return the figures as Markdown, without markers."""
    parts = [
        f"Command: `{command}`\n\n" + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        _totals(matrix),
        "### Each scenario",
        _summary(matrix),
        *(_fault_parts(matrix) if matrix.faults else []),
        "### Clean models",
        f"{_LETTERS['EXACT']} EXACT, {_LETTERS['STRUCTURAL_DRIFT']} STRUCTURAL_DRIFT, {_LETTERS['MISMATCH']} MISMATCH, "
        f"{_LETTERS['INCONCLUSIVE']} INCONCLUSIVE, blank: does not apply. "
        "What alarms is a finding about an engine: [findings](../findings/README.md).",
        _grid(matrix, matrix.clean),
        "### Where a scenario does not apply",
        _absent(matrix),
    ]
    return "\n\n".join(parts) + "\n"


def _totals(matrix: Matrix) -> str:
    missed = [name for item in matrix.scenarios.values() for name in item.missed]
    broken = [f"{row.name} on {row.model}: {row.error}" for row in matrix.rows if row.error is not None]
    wanting = [item.name for item in matrix.wanting]
    lines = [
        f"{len(matrix.faults)} faults and {len(matrix.clean)} clean models, each under `--scenario all`; "
        f"{sum(row.made for row in matrix.rows)} forward passes made by scenarios, "
        f"{sum(row.spared for row in matrix.rows)} prefills spared by sharing; "
        f"{sum(row.seconds for row in matrix.rows):.0f} s.",
        f"Not found at their address by the scenario they were made for: {', '.join(missed) or 'none'}.",
        f"Scenarios that apply here and find fewer than two faults alone: {', '.join(wanting) or 'none'}.",
        f"Runs that broke off: {'; '.join(broken) or 'none'}.",
    ]
    return "\n".join(f"* {line}" for line in lines)


def _summary(matrix: Matrix) -> str:
    head = ["scenario", "faults made for it", "finds", "finds alone", "which", "clean models passed", "alarms"]
    return table(head, [_scenario(item) for item in matrix.scenarios.values()])


def _scenario(item: ScenarioFigures) -> list[str]:
    alarms = ", ".join(f"{model} ({verdict})" for model, verdict in item.alarms.items())
    counts = [str(len(names)) for names in (item.made_for, item.found, item.alone)]
    return [item.name, *counts, ", ".join(item.alone), str(len(item.clean)), alarms]


def _fault_parts(matrix: Matrix) -> list[str]:
    clean = {row.model: row for row in matrix.clean}
    listed = [
        [row.name, str(row.mechanism), str(row.needs), row.model, str(row.reference), str(row.where)]
        for row in matrix.faults
    ]
    return [
        "### Faults",
        table(["fault", "class", "made for", "model", "real bug of that class", "what is planted"], listed),
        "### Faults and scenarios",
        f"{_AT} MISMATCH at the planted address, {_ELSEWHERE} MISMATCH elsewhere, {_AS_WITHOUT} MISMATCH as without "
        f"the fault, {_UNSURE} INCONCLUSIVE, {_QUIET} neither, blank: does not apply. The columns, in this order: "
        + ", ".join(f"{number} {name}" for number, name in enumerate(matrix.scenarios, start=1))
        + ".",
        _grid(matrix, matrix.faults, clean),
    ]


def _grid(matrix: Matrix, rows: list[MatrixRow], clean: Mapping[str, MatrixRow] | None = None) -> str:
    lines = []
    for row in rows:
        found = () if clean is None else finders(row, clean.get(row.model))
        cells = []
        for name in matrix.scenarios:
            cell = row.cells.get(name)
            cells.append("" if cell is None else _clean_mark(cell) if clean is None else _mark(cell, name in found))
        lines.append([row.model if clean is None else row.name, *cells])
    return table(["", *(str(number) for number in range(1, len(matrix.scenarios) + 1))], lines)


def _mark(cell: Cell, found: bool) -> str:
    if cell.verdict is None:
        return ""
    if cell.is_mismatch:
        return (_AT if cell.right else _ELSEWHERE) if found else _AS_WITHOUT
    return _UNSURE if cell.verdict == "INCONCLUSIVE" else _QUIET


def _clean_mark(cell: Cell) -> str:
    return "" if cell.verdict is None else _LETTERS[cell.verdict]


def _absent(matrix: Matrix) -> str:
    rows = [
        [item.name, reason, ", ".join(models)]
        for item in matrix.scenarios.values()
        for reason, models in item.does_not_apply.items()
    ]
    return table(["scenario", "reason", "models"], rows)
