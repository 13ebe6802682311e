"""The figures of a benchmark as Markdown, and putting them between the markers of a document."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from kvdrift.bench.markdown import table
from kvdrift.bench.peer_summary import PeerFigures
from kvdrift.bench.peers import RULES
from kvdrift.bench.power_tables import power_tables
from kvdrift.bench.records import LADDER, NATIVE
from kvdrift.bench.summary import Share, Summary, WayFigures
from kvdrift.errors import UsageError

BEGIN = "<!-- kvdrift bench faults: begin; written by the command, changes here are lost -->"
END = "<!-- kvdrift bench faults: end -->"
_WAY_NAMES = {LADDER: "with the ladder", NATIVE: "native dtype alone"}
_PACKAGES = ("kvdrift", "torch", "transformers", "numpy")
_MOST_NAMES = 60
_LONGEST_NAME = 240


def machine_facts() -> dict[str, str]:
    """Return what the figures may depend on: cores and versions; nothing that names this machine."""
    facts = {
        "cores": str(os.cpu_count() or "unknown"),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "unknown"
    return facts


def render(summary: Summary, command: str, facts: Mapping[str, str]) -> str:
    """Return the figures as Markdown, without markers."""
    parts = [
        f"Command: `{command}`\n\n" + ", ".join(f"{name} {value}" for name, value in facts.items()) + ".",
        _what_was_run(summary),
        *(_way_table(summary.ways) if summary.ways else ["Nothing was judged."]),
        *power_tables(summary.power),
        *(_peer_tables(summary) if summary.peers else []),
        *(_names(way, figures) for way, figures in summary.ways.items()),
        _list("Faults that were committed and changed no tensor", summary.without_effect),
        _list("Runs or diagnoses that broke off", summary.broken),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def write_between_markers(path: Path, text: str) -> None:
    """Put `text` between the markers of the document, at its end if it has none yet.

    Raises:
        UsageError: the document has one marker without the other, or cannot be written.
    """
    try:
        document = path.read_text(encoding="utf-8") if path.exists() else ""
        begins, ends = document.count(BEGIN), document.count(END)
        if (begins, ends) == (0, 0):
            gap = "\n" if document else ""
            document = f"{document}{gap}{BEGIN}\n\n{text}\n{END}\n"
        elif (begins, ends) == (1, 1) and document.index(BEGIN) < document.index(END):
            before, after = document[: document.index(BEGIN)], document[document.index(END) + len(END) :]
            document = f"{before}{BEGIN}\n\n{text}\n{END}{after}"
        else:
            raise UsageError(f"{path} must have the marker lines once each and in this order: {BEGIN!r}, {END!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(document, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}; name another file with --markdown") from error


def shown(share: Share) -> str:
    """A share with its counts and its interval; a dash where nothing was tried.

    >>> shown(Share(0, 0)), shown(Share(3, 4))
    ('– (0 of 0)', '75.0 % (3 of 4; 19.4–99.4)')
    """
    if share.share is None:
        return "– (0 of 0)"
    low, high = share.interval
    return f"{_percent(share.share)} ({share.hits} of {share.trials}; {100 * low:.1f}–{100 * high:.1f})"


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


def _way_table(ways: Mapping[str, WayFigures]) -> list[str]:
    rows = (
        ("faults detected", "detected"),
        ("… of those above the stated minimum detectable effect", "detected_above"),
        ("right layer, of the detected", "right_layer"),
        ("right site or the next one, of the detected", "right_address"),
        ("right cause, of the diagnosed", "right_cause"),
        ("false alarms on clean runs", "clean"),
        ("false alarms on clean twins", "twins"),
        ("clean runs and twins without a verdict", "unsure"),
    )
    head = table(
        ["", *(_WAY_NAMES.get(way, way) for way in ways)],
        [[text, *(shown(getattr(figures, name)) for figures in ways.values())] for text, name in rows],
    )
    wrong = "; ".join(
        f"{_WAY_NAMES.get(way, way)}: of {f.right_cause.trials - f.right_cause.hits} that are not right, "
        f"{f.named_wrongly} name another cause and the others none"
        for way, f in ways.items()
        if f.right_cause.trials > f.right_cause.hits
    )
    return [
        "### kvdrift",
        head,
        wrong and f"Diagnoses, {wrong}.",
        "### By class of mechanism",
        _grouped(ways, "by_class"),
        "### By dtype",
        _grouped(ways, "by_dtype"),
    ]


def _grouped(ways: Mapping[str, WayFigures], name: str) -> str:
    header = [""]
    for way in ways:
        label = _WAY_NAMES.get(way, way)
        header += [f"{label}: detected", "right layer", "right site"]
    keys = sorted({key for figures in ways.values() for key in getattr(figures, name)})
    rows = []
    for key in keys:
        row = [key]
        for figures in ways.values():
            row += [_counts(share) for share in getattr(figures, name).get(key, (Share(0, 0),) * 3)]
        rows.append(row)
    return table(header, rows)


def _peer_tables(summary: Summary) -> list[str]:
    parts = [
        "### Other tools' rules, on the same tensors",
        "Found: runs with a fault in which the rule flags at least one tensor; in brackets, those in which the first "
        "flagged tensor is the right one or the one after it. Best: the threshold that spares every clean run and "
        "finds the most faults, chosen for each model and dtype on these very runs, which no tool could know "
        "beforehand. Quiet: the same, sparing the clean twins as well, as kvdrift has to. AUC: the chance that a fault "
        "raises a larger alarm than a clean run.",
    ]
    for dtype in sorted({figures.dtype for figures in summary.peers}):
        rows = [
            _peer_row(rule.name, [f for f in summary.peers if f.dtype == dtype and f.rule == rule.name])
            for rule in RULES
        ]
        rows = [row for row in rows if row]
        for way, figures in summary.ways.items():
            detected, _, placed = figures.by_dtype.get(dtype, (Share(0, 0),) * 3)
            alarms = [_counts(share) for share in figures.alarms_by_dtype.get(dtype, (Share(0, 0),) * 2)]
            label = f"**kvdrift**, {_WAY_NAMES.get(way, way)}"
            rows.append([label, _found(placed.hits, detected), *alarms, "", "", "", "", ""])
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
    parts += [
        "#### The rules",
        table(
            ["rule", "flags a tensor if", "source"], [[r.name, r.formula.replace("|", "\\|"), r.source] for r in RULES]
        ),
        "x is prefill, y decode, d = y − x, r prefill at float64. A tensor in which one side has other keys, or a NaN "
        "or infinity that the other lacks, is flagged by every rule.",
    ]
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
        _percent(sum(at) / weight) if weight else "–",
    ]


def _found(placed: int, share: Share) -> str:
    return f"{share.hits} of {share.trials} [{placed}]"


def _names(way: str, figures: WayFigures) -> str:
    label = _WAY_NAMES.get(way, way)
    lists = (
        ("not detected", figures.missed),
        ("detected elsewhere", figures.misplaced),
        ("another cause or none", figures.misnamed),
        ("false alarms", figures.alarms),
        ("clean, and no verdict", figures.doubts),
    )
    parts = [_list(f"{label}: {title}", names) for title, names in lists]
    return "\n\n".join(part for part in parts if part)


def _list(title: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    more = [f"- … and {len(names) - _MOST_NAMES} more"] if len(names) > _MOST_NAMES else []
    body = "\n".join([*(f"- {name[:_LONGEST_NAME]}" for name in names[:_MOST_NAMES]), *more])
    return f"<details><summary>{title} ({len(names)})</summary>\n\n{body}\n\n</details>"


def _counts(share: Share) -> str:
    return f"{share.hits} of {share.trials}"


def _percent(share: float) -> str:
    """Rounded, but 100 only for all and 0 only for none."""
    value = 100.0 * share
    if 0.0 < value < 0.1 or 99.9 < value < 100.0:
        return f"{min(99.9, max(0.1, value)):.1f} %"
    return f"{value:.1f} %"
