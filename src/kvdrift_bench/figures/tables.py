"""The figures of a benchmark as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from kvdrift_bench.figures.markdown import table
from kvdrift_bench.figures.peer_tables import peer_tables
from kvdrift_bench.figures.power_tables import power_tables
from kvdrift_bench.figures.promises import check_promises
from kvdrift_bench.figures.shares import WAY_NAMES, counts, shown
from kvdrift_bench.figures.summary import DtypeFigures, Figures, Summary, WayFigures
from kvdrift_bench.run.records import LADDER

_MOST_NAMES = 60
_LONGEST_NAME = 240


def render(
    summary: Summary,
    command: str,
    facts: Mapping[str, str],
    *,
    by_fault: bool = False,
    drawn: Mapping[str, str] | None = None,
) -> str:
    """Return the figures as Markdown, without markers; `drawn` are the file names of the ROC curves by dtype."""
    parts = [
        f"Command: `{command}`\n\n" + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        _what_was_run(summary),
        *(_way_table(summary.ways) if summary.ways else ["Nothing was judged."]),
        *(_promises(summary) if summary.ways else []),
        *(_groups(summary.ways, by_fault=by_fault) if summary.ways else []),
        *power_tables(summary.power),
        *(peer_tables(summary, drawn or {}) if summary.peers else []),
        *(_names(way, figures) for way, figures in summary.ways.items()),
        _list("Faults that were committed and changed no tensor", summary.without_effect),
        _list("Runs or diagnoses that broke off", summary.broken),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _what_was_run(summary: Summary) -> str:
    lines = [
        f"{summary.n_faults} runs with a planted fault that changed a tensor, {summary.n_twins} with a clean twin, "
        f"{summary.n_clean} clean ones; {summary.n_tensors} pairs of tensors.",
        f"Settings: {', '.join(summary.settings) or 'none'}.",
        "Shares are followed by their counts and the exact (Clopper-Pearson) 95 % interval, in per cent.",
    ]
    if summary.skipped:
        top = sorted(summary.skipped.items(), key=lambda item: -item[1])
        lines.append(
            f"Not run: {sum(summary.skipped.values())} subjects ("
            + "; ".join(f"{count} {reason}" for reason, count in top[:8])
            + ("; …" if len(top) > 8 else "")
            + ")."
        )
    return "\n".join(lines)


def _columns(ways: Mapping[str, WayFigures]) -> dict[str, DtypeFigures]:
    """The figures that stand beside each other: with the ladder all dtypes as one; without it each by itself, since
    what can be judged differs."""
    columns: dict[str, DtypeFigures] = {}
    for way, figures in ways.items():
        if way == LADDER:
            columns[WAY_NAMES[way]] = figures
        else:
            columns |= {f"{WAY_NAMES.get(way, way)}, {dtype}": some for dtype, some in figures.by_dtype.items()}
    return columns


def _way_table(ways: Mapping[str, WayFigures]) -> list[str]:
    columns = _columns(ways)
    rows = (
        ("faults detected", "detected"),
        ("… without a verdict (INCONCLUSIVE): neither found nor passed", "undecided"),
        ("detected of those above the stated minimum detectable effect", "detected_above"),
        ("… of those without a verdict", "undecided_above"),
        ("right layer, of the detected", "right_layer"),
        ("right site or the next one, of the detected", "right_address"),
        ("right cause, of the diagnosed", "right_cause"),
        ("false alarms on clean runs", "clean"),
        ("false alarms on clean twins", "twins"),
        ("clean runs and twins without a verdict", "unsure"),
    )
    head = table(
        ["", *columns],
        [[text, *(shown(getattr(figures, name)) for figures in columns.values())] for text, name in rows],
    )
    wrong = "; ".join(
        f"{label}: of {f.right_cause.trials - f.right_cause.hits} that are not right, "
        f"{f.named_wrongly} name another cause and the others none"
        for label, f in columns.items()
        if f.right_cause.trials > f.right_cause.hits
    )
    return ["### kvdrift", head, wrong and f"Diagnoses, {wrong}."]


def _promises(summary: Summary) -> list[str]:
    said = {True: "yes", False: "**no**", None: "not measured"}
    rows = [
        [p.what, "none" if p.least is None else f"at least {100 * p.least:g} %", shown(p.share), said[p.is_kept]]
        for p in check_promises(summary)
    ]
    return [
        "### Promised and measured",
        table(["", "promised", "measured", "met"], rows),
        "A fault above the stated minimum that ends without a verdict counts as not detected here. A promise is met if "
        "the measured share is at least the promised one; the interval says how sure that is.",
    ]


def _groups(ways: Mapping[str, WayFigures], *, by_fault: bool) -> list[str]:
    parts = ["### By class of mechanism", _grouped(_columns(ways), lambda f: f.by_class)]
    if by_fault:
        parts += ["### By fault", "Of all its runs.", _grouped(_columns(ways), lambda f: f.by_fault)]
    by_dtype = {WAY_NAMES.get(way, way): figures.by_dtype for way, figures in ways.items()}
    return [*parts, "### By dtype", _by_key(by_dtype)]


def _grouped(columns: Mapping[str, DtypeFigures], groups: Callable[[DtypeFigures], Mapping[str, Figures]]) -> str:
    return _by_key({label: groups(figures) for label, figures in columns.items()})


def _by_key(columns: Mapping[str, Mapping[str, Figures]]) -> str:
    """Found, no verdict, right site and right cause, by a key of the runs with a fault."""
    header = [""]
    for label in columns:
        header += [f"{label}: found", "no verdict", "site right", "cause right"]
    rows = []
    for key in sorted({key for groups in columns.values() for key in groups}):
        row = [key]
        for groups in columns.values():
            some = groups.get(key)
            row += ["–"] * 4 if some is None else _cells(some)
        rows.append(row)
    return table(header, rows)


def _cells(some: Figures) -> list[str]:
    cause = some.right_cause
    return [
        counts(some.detected),
        str(some.undecided.hits),
        counts(some.right_address),
        counts(cause) if cause.trials else "–",
    ]


def _names(way: str, figures: WayFigures) -> str:
    label = WAY_NAMES.get(way, way)
    lists = (
        ("not detected", figures.missed),
        ("detected elsewhere", figures.misplaced),
        ("another cause or none", figures.misnamed),
        ("false alarms", figures.alarms),
        ("no verdict, by reason", [f"{count} × {reason}" for reason, count in figures.doubts.items()]),
    )
    parts = [_list(f"{label}: {title}", names) for title, names in lists]
    return "\n\n".join(part for part in parts if part)


def _list(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = [f"- … and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    body = "\n".join([*(f"- {name[:_LONGEST_NAME]}" for name in names[:_MOST_NAMES]), *more])
    return f"<details><summary>{title} ({len(names)})</summary>\n\n{body}\n\n</details>"
