"""The figures of a benchmark as Markdown: words and tables stand in `templates/`, the figures are computed before."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift_bench.catalogue import catalogue
from kvdrift_bench.figures.kernel_figures import KernelFigures
from kvdrift_bench.figures.peer_figures import figures_by_dtype
from kvdrift_bench.figures.promises import check_promises
from kvdrift_bench.figures.scenario_figures import Matrix, clean_mark, fault_mark, finders
from kvdrift_bench.figures.shares import WAY_NAMES, Share, counts, percent, shown
from kvdrift_bench.figures.summary import DtypeFigures, Summary, WayFigures
from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.peers.summary import SHARES
from kvdrift_bench.run.records import LADDER

_MOST_NAMES = 60
_LONGEST_NAME = 240


def render_faults(
    summary: Summary,
    command: str,
    facts: Mapping[str, str],
    *,
    by_fault: bool = False,
    drawn: Mapping[str, str] | None = None,
) -> str:
    """Return the figures of `kvdrift-bench faults`, without markers.

    Args:
        summary: the figures.
        command: what gives them.
        facts: what they may depend on, such as versions.
        by_fault: whether each fault has a line of its own.
        drawn: the file names of the ROC curves by dtype.
    """
    columns = _columns(summary.ways)
    return _rendered(
        "faults.md.jinja",
        summary=summary,
        command=command,
        facts=facts,
        columns=columns,
        promises=check_promises(summary),
        by_class={label: figures.by_class for label, figures in columns.items()},
        by_fault={label: figures.by_fault for label, figures in columns.items()} if by_fault else None,
        by_dtype={_label(way): figures.by_dtype for way, figures in summary.ways.items()},
        by_way={_label(way): figures for way, figures in summary.ways.items()},
        peers=figures_by_dtype(summary),
        drawn=drawn or {},
        rules=RULES,
        shares=[f"{100 * share:g} %" for share in SHARES],
        # What a rule gets that wants to know the exact values: the fine rung of the engine.
        has_dtypes=all(figures.dtype in UNIT_ROUNDOFF for figures in summary.peers),
        MOST_NAMES=_MOST_NAMES,
        LONGEST_NAME=_LONGEST_NAME,
    )


def render_scenarios(matrix: Matrix, command: str, facts: Mapping[str, str]) -> str:
    """Return the figures of `kvdrift-bench scenarios`, without markers."""
    clean = {row.model: row for row in matrix.clean}
    planted = []
    for row in matrix.faults:
        found = finders(row, clean.get(row.model))
        planted.append((row.name, [fault_mark(row.cells.get(name), name in found) for name in matrix.scenarios]))
    return _rendered(
        "scenarios.md.jinja",
        matrix=matrix,
        command=command,
        facts=facts,
        planted_marks=planted,
        clean_marks=[
            (row.model, [clean_mark(row.cells.get(name)) for name in matrix.scenarios]) for row in matrix.clean
        ],
    )


def render_kernels(figures: KernelFigures, command: str, facts: Mapping[str, str]) -> str:
    """Return the figures of `kvdrift-bench kernels`, without markers."""
    lines = catalogue()
    kinds = ("kernel", "draw")
    alarms = {kind: [run.verdict == "MISMATCH" for run in figures.runs if run.kind == kind] for kind in kinds}
    return _rendered(
        "kernels.md.jinja",
        figures=figures,
        command=command,
        facts=facts,
        lines=lines.kernels,
        fault_lines=lines.kernel_faults,
        ladders=sorted({ladder for _, ladder in figures.whole}, reverse=True),
        kinds={"kernel": "correct kernels", "draw": "correct kernels, drawn", "fault": "faults of kernels"},
        shares={kind: Share(sum(found), len(found)) for kind, found in alarms.items()},
    )


def _columns(ways: Mapping[str, WayFigures]) -> dict[str, DtypeFigures]:
    """Return the figures that stand beside each other: with the ladder all dtypes as one; without it each by itself,
    since what can be judged differs."""
    columns: dict[str, DtypeFigures] = {}
    for way, figures in ways.items():
        if way == LADDER:
            columns[_label(way)] = figures
        else:
            columns |= {f"{_label(way)}, {dtype}": some for dtype, some in figures.by_dtype.items()}
    return columns


def _label(way: str) -> str:
    return WAY_NAMES.get(way, way)


def _rendered(template: str, **values: Any) -> str:
    text = _environment().get_template(template).render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("kvdrift_bench.figures"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,  # Markdown, not HTML
    )
    environment.filters |= {
        "shown": shown,
        "counts": counts,
        "percent": percent,
        "all_keys": lambda columns: sorted({key for groups in columns.values() for key in groups}),
        "get_or_none": lambda groups, key: groups.get(key),
        "counted": lambda doubts: [f"{count} × {reason}" for reason, count in doubts.items()],
    }
    return environment
