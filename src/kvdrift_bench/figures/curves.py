"""The peers' rules at any threshold beside kvdrift, by dtype: what the tables and the figure show."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kvdrift_bench.figures.markdown import percent, table
from kvdrift_bench.figures.shares import Share
from kvdrift_bench.figures.summary import Summary
from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.peers.summary import SHARES, Points, found_where, pooled_curve


@dataclass(frozen=True, slots=True)
class RuleCurves:
    """One rule at one dtype over all models: faults found by false alarms on clean runs, and on twins as well."""

    rule: str
    clean: Points
    harmless: Points


@dataclass(frozen=True, slots=True)
class OperatingPoint:
    """Where kvdrift stands, which has no threshold to choose."""

    way: str
    found: Share
    clean: Share
    twins: Share

    def alarms(self, *, with_twins: bool) -> Share:
        """False alarms on the clean runs, and on the twins if they are wanted."""
        twins = self.twins if with_twins else Share(0, 0)
        return Share(self.clean.hits + twins.hits, self.clean.trials + twins.trials)


@dataclass(frozen=True, slots=True)
class DtypeCurves:
    """Everything at one dtype."""

    dtype: str
    rules: tuple[RuleCurves, ...]
    points: tuple[OperatingPoint, ...]


def curves_of(summary: Summary) -> list[DtypeCurves]:
    """Return the curves by dtype; rules without faults or without harmless runs have none."""
    result = []
    for dtype in sorted({figures.dtype for figures in summary.peers}):
        rules = []
        for rule in RULES:
            of_rule = [f for f in summary.peers if f.dtype == dtype and f.rule == rule.name]
            clean = pooled_curve([(f.roc, f.faults) for f in of_rule])
            harmless = pooled_curve([(f.roc_harmless, f.faults) for f in of_rule])
            if harmless:
                rules.append(RuleCurves(rule.name, clean, harmless))
        points = [
            OperatingPoint(way, of.detected, of.clean, of.twins)
            for way, figures in summary.ways.items()
            if (of := figures.by_dtype.get(dtype)) is not None
        ]
        if rules:
            result.append(DtypeCurves(dtype, tuple(rules), tuple(points)))
    return result


def curve_tables(curves: DtypeCurves, names: dict[str, str]) -> list[str]:
    """Return the tables of one dtype; `names` are those of kvdrift's ways of judging."""
    parts = []
    for title, with_twins in (("clean runs and clean twins", True), ("clean runs alone", False)):
        rows = [_row(curve.rule, curve.harmless if with_twins else curve.clean) for curve in curves.rules]
        for point in curves.points:
            alarms = point.alarms(with_twins=with_twins)
            if point.found.share is not None and alarms.share is not None:
                label = f"**kvdrift**, {names.get(point.way, point.way)}"
                rows.append(_row(label, [(alarms.share, point.found.share)]))
        header = [f"false alarms on {title}, at most", *(f"{100 * share:g} %" for share in SHARES)]
        parts.append(table(header, [row for row in rows if any(cell != "–" for cell in row[1:])]))
    return parts


def _row(label: str, points: Sequence[tuple[float, float]]) -> list[str]:
    found = [found_where(list(points), share) for share in SHARES]
    return [label, *("–" if share is None else percent(share) for share in found)]
