"""The summary of a sweep: every declared cell, what it ended in, and one verdict for all."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version

from kvdrift.report.schema.others import SweepCellView, SweepView
from kvdrift.sweep.cells import CellState, SweepCell
from kvdrift.sweep.store import CellResult, Declared

_EXIT = {"PASS": 0, "FAIL": 1, "INCOMPLETE": 6, "INCONCLUSIVE": 6}


def build_summary(declared: Declared, results: Mapping[str, CellResult]) -> SweepView:
    """Return the summary. A cell without a result is MISSING."""
    cells = [_cell(cell, results.get(cell.id)) for cell in declared.cells]
    counts = Counter(str(cell.state) for cell in cells)
    verdict, reasons = _verdict(counts)
    return SweepView(
        schema_version=1,
        kind="sweep",
        name=declared.spec.name,
        created=declared.created,
        verdict=verdict,  # type: ignore[arg-type]  # one of its names
        exit_code=_EXIT[verdict],
        reasons=reasons,
        alpha=declared.spec.alpha,
        alpha_of_a_cell=alpha_of_a_cell(declared),
        counts={str(state): counts[str(state)] for state in CellState},  # type: ignore[misc]
        cells=cells,
        version=version("kvdrift"),
    )


def alpha_of_a_cell(declared: Declared) -> float:
    """Return the share of a cell in the alpha of the sweep (Bonferroni): comparisons of engines use none of it."""
    n_audits = sum(cell.why_not is None and cell.versus is None for cell in declared.cells)
    return declared.spec.alpha / max(1, n_audits)


def _cell(cell: SweepCell, result: CellResult | None) -> SweepCellView:
    return SweepCellView(
        id=cell.id,
        model=cell.model,
        engine=cell.engine,
        dtype=cell.dtype,
        attention=cell.attention,
        cache=cell.cache,
        scenario=cell.scenario,
        prompt=cell.prompt,
        lengths=cell.lengths,
        seed=cell.seed,
        state=str(CellState.MISSING if result is None else result.state),  # type: ignore[arg-type]
        verdict=None if result is None else result.verdict,
        first_failure=None if result is None else result.first_failure,
        cause=None if result is None else result.cause,
        reasons=[] if result is None else list(result.reasons),
        report=None if result is None else result.report,
        seconds=None if result is None else result.seconds,
    )


def _verdict(counts: Mapping[str, int]) -> tuple[str, list[str]]:
    """Return the verdict of all and its reasons: one failure fails, and nothing that was not judged passes."""
    reasons = []
    if lacking := counts["MISSING"] + counts["ERROR"]:
        reasons.append(
            f"{lacking} cells that apply have no verdict ({counts['MISSING']} missing, {counts['ERROR']} errors)"
        )
    if counts["INCONCLUSIVE"]:
        reasons.append(f"{counts['INCONCLUSIVE']} cells are INCONCLUSIVE")
    if counts["FAIL"]:
        return "FAIL", [f"{counts['FAIL']} cells are MISMATCH", *reasons]
    if lacking:
        return "INCOMPLETE", reasons
    if counts["INCONCLUSIVE"]:
        return "INCONCLUSIVE", reasons
    if not counts["PASS"]:
        return "INCONCLUSIVE", ["no cell applies, so that nothing was compared"]
    return "PASS", []


__all__ = ["alpha_of_a_cell", "build_summary"]
