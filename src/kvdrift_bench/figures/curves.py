"""The peers' rules at any threshold beside kvdrift, by dtype: what the tables and the figure show."""

from __future__ import annotations

from dataclasses import dataclass

from kvdrift_bench.figures.shares import Share
from kvdrift_bench.figures.summary import Summary
from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.peers.summary import Points, pooled_curve


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
