"""Other tools' rules beside kvdrift, dtype by dtype and over all models: plain figures for the document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvdrift_bench.figures.curves import DtypeCurves, curves_of
from kvdrift_bench.figures.shares import WAY_NAMES, Share
from kvdrift_bench.figures.summary import DtypeFigures, Summary
from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.peers.summary import SHARES, PeerFigures, Points, found_where

Row = list[float | None]  # the share of found faults at each of SHARES; None without a curve


@dataclass(frozen=True, slots=True)
class RuleFigures:
    """One rule at one dtype, over all models.

    Attributes:
        found, placed: faults found, and of those how many at the right tensor or the one after it.
        clean_alarms, twin_alarms: false alarms.
        best_found, best_placed, best_twin_alarms: the same at the thresholds that spare every clean run.
        quiet_found, quiet_placed: the same at those that spare the twins as well.
        auc, found_at_5: means over the models, weighted by their faults; None without a curve.
    """

    rule: str
    found: Share
    placed: int
    clean_alarms: Share
    twin_alarms: Share
    best_found: Share
    best_placed: int
    best_twin_alarms: Share
    quiet_found: Share
    quiet_placed: int
    auc: float | None
    found_at_5: float | None


@dataclass(frozen=True, slots=True)
class PeersAtDtype:
    """All rules and kvdrift at one dtype; `curves` has a row for each rule by the harmless runs that may not alarm."""

    dtype: str
    rules: list[RuleFigures]
    ways: dict[str, DtypeFigures]
    curves: dict[str, dict[str, Row]]


def figures_by_dtype(summary: Summary) -> list[PeersAtDtype]:
    """Return the figures of each dtype, none if no rule was applied."""
    curves = {item.dtype: _curve_rows(item) for item in curves_of(summary)}
    result = []
    for dtype in sorted({figures.dtype for figures in summary.peers}):
        by_rule = {rule.name: [f for f in summary.peers if (f.dtype, f.rule) == (dtype, rule.name)] for rule in RULES}
        ways = {
            WAY_NAMES.get(way, way): figures.by_dtype[dtype]
            for way, figures in summary.ways.items()
            if dtype in figures.by_dtype
        }
        rules = [_pooled(rule, figures) for rule, figures in by_rule.items() if figures]
        result.append(PeersAtDtype(dtype, rules, ways, curves.get(dtype, {})))
    return result


def _pooled(rule: str, figures: Sequence[PeerFigures]) -> RuleFigures:
    def total(name: str) -> int:
        return sum(getattr(f, name) for f in figures)

    faults, clean, twins = total("faults"), total("clean"), total("twins")
    known = [f for f in figures if f.auc is not None]
    weight = sum(f.faults for f in known)
    return RuleFigures(
        rule=rule,
        found=Share(total("found"), faults),
        placed=total("placed"),
        clean_alarms=Share(total("clean_alarms"), clean),
        twin_alarms=Share(total("twin_alarms"), twins),
        best_found=Share(total("best_found"), faults),
        best_placed=total("best_placed"),
        best_twin_alarms=Share(total("best_twin_alarms"), twins),
        quiet_found=Share(total("quiet_found"), faults),
        quiet_placed=total("quiet_placed"),
        auc=sum((f.auc or 0.0) * f.faults for f in known) / weight if weight else None,
        found_at_5=sum((f.found_at["0.05"] or 0.0) * f.faults for f in known) / weight if weight else None,
    )


def _curve_rows(curves: DtypeCurves) -> dict[str, dict[str, Row]]:
    """Return the rows by what may not alarm; rules and ways without any point have none."""
    tables = {}
    for title, with_twins in (("clean runs and clean twins", True), ("clean runs alone", False)):
        rows = {curve.rule: _row(curve.harmless if with_twins else curve.clean) for curve in curves.rules}
        for point in curves.points:
            alarms = point.alarms(with_twins=with_twins)
            if point.found.share is not None and alarms.share is not None:
                rows[f"**kvdrift**, {WAY_NAMES.get(point.way, point.way)}"] = _row([(alarms.share, point.found.share)])
        tables[title] = {label: row for label, row in rows.items() if any(share is not None for share in row)}
    return tables


def _row(points: Points) -> Row:
    return [found_where(points, share) for share in SHARES]
