"""Other tools' rules beside kvdrift, as Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift_bench.figures.curves import DtypeCurves, curve_tables, curves_of
from kvdrift_bench.figures.markdown import percent, table
from kvdrift_bench.figures.shares import WAY_NAMES, Share, counts
from kvdrift_bench.figures.summary import Summary
from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.peers.summary import PeerFigures


def peer_tables(summary: Summary, drawn: Mapping[str, str]) -> list[str]:
    """Return the parts of the document about the peers; `drawn` are the file names of their curves by dtype."""
    parts = [
        "### Other tools' rules, on the same tensors",
        "Found: runs with a fault in which the rule flags at least one tensor; in brackets, those in which the first "
        "flagged tensor is the right one or the one after it. Best: the threshold that spares every clean run and "
        "finds the most faults, chosen for each model and dtype on these very runs, which no tool could know "
        "beforehand. Quiet: the same, sparing the clean twins as well, as kvdrift has to. AUC: the chance that a fault "
        "raises a larger alarm than a clean run.",
    ]
    curves = {item.dtype: item for item in curves_of(summary)}
    for dtype in sorted({figures.dtype for figures in summary.peers}):
        rows = [
            _peer_row(rule.name, [f for f in summary.peers if f.dtype == dtype and f.rule == rule.name])
            for rule in RULES
        ]
        rows = [row for row in rows if row]
        for way, figures in summary.ways.items():
            of_dtype = figures.by_dtype.get(dtype)
            if of_dtype is None:
                continue
            alarms = [counts(of_dtype.clean), counts(of_dtype.twins)]
            label = f"**kvdrift**, {WAY_NAMES.get(way, way)}"
            rows.append([label, _found(of_dtype.right_address.hits, of_dtype.detected), *alarms, "", "", "", "", ""])
        header = [
            "rule",
            "found",
            "clean alarms",
            "twin alarms",
            "best: found",
            "twin alarms",
            "quiet: found",
            "AUC",
            "found at 5 % alarms",
        ]
        parts += [f"#### {dtype}", table(header, rows)]
        if dtype in curves:
            parts += _curves(curves[dtype], drawn)
    parts += [
        "#### The rules",
        table(
            ["rule", "flags a tensor if", "source"], [[r.name, r.formula.replace("|", "\\|"), r.source] for r in RULES]
        ),
        f"x is prefill, y decode, d = y − x, r prefill {_reference(summary)}. A tensor in which one side has other "
        "keys, or a NaN or infinity that the other lacks, is flagged by every rule.",
    ]
    return parts


def _reference(summary: Summary) -> str:
    """What a rule gets that wants to know the exact values: the fine rung of the engine."""
    has_dtypes = all(figures.dtype in UNIT_ROUNDOFF for figures in summary.peers)
    return "at float64" if has_dtypes else "in the finest configuration"


def _curves(curves: DtypeCurves, drawn: Mapping[str, str]) -> list[str]:
    parts = [
        f"##### {curves.dtype}, at any threshold",
        "Share of the faults that a rule finds where it may flag at most this share of the harmless runs: the best "
        "threshold for that, chosen for each model on these very runs. kvdrift has no threshold to turn; its one point "
        "stands from its own share of false alarms on.",
        *curve_tables(curves, WAY_NAMES),
    ]
    if curves.dtype in drawn:
        parts.append(f"![Faults found by false alarms at {curves.dtype}, one panel a rule]({drawn[curves.dtype]})")
    return parts


def _peer_row(rule: str, found: Sequence[PeerFigures]) -> list[str]:
    if not found:
        return []
    n_faults = sum(f.faults for f in found)
    n_clean, n_twins = sum(f.clean for f in found), sum(f.twins for f in found)
    known = [f for f in found if f.auc is not None]
    weight = sum(f.faults for f in known)
    auc = sum((f.auc or 0.0) * f.faults for f in known) / weight if weight else None
    at = [(f.found_at["0.05"] or 0.0) * f.faults for f in known]
    best = _found(sum(f.best_placed for f in found), Share(sum(f.best_found for f in found), n_faults))
    quiet = _found(sum(f.quiet_placed for f in found), Share(sum(f.quiet_found for f in found), n_faults))
    return [
        rule,
        _found(sum(f.placed for f in found), Share(sum(f.found for f in found), n_faults)),
        f"{sum(f.clean_alarms for f in found)} of {n_clean}",
        f"{sum(f.twin_alarms for f in found)} of {n_twins}",
        best if n_clean else "–",
        f"{sum(f.best_twin_alarms for f in found)} of {n_twins}" if n_clean else "–",
        quiet if n_clean else "–",
        "–" if auc is None else f"{auc:.3f}",
        percent(sum(at) / weight) if weight else "–",
    ]


def _found(placed: int, share: Share) -> str:
    return f"{share.hits} of {share.trials} [{placed}]"
