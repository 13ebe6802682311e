"""A verdict in at most ten lines, for a test's failure, a CI log or a terminal."""

from __future__ import annotations

from pathlib import Path
from textwrap import shorten
from typing import Any

_WIDTH = 320
_MOST_REASONS = 3


def ten_lines(view: dict[str, Any], path: Path | None) -> list[str]:
    """Return verdict, what it is about, first failure, cause, shape and the place of the report, a line each.

    Args:
        view: a report as plain data, of an audit in this process or read back from report.json; that of a server too.
        path: the run directory, None if none was written.
    """
    kind = f" ({view['kind']})" if view.get("kind") else ""
    lines = [f"{view['verdict']}{kind}: {_subject(view)}"]
    if view.get("scope"):
        lines.append(f"scope: {view['scope']}")
    conclusion = view["hypotheses"]["conclusion"] if "hypotheses" in view else view.get("conclusion", "")
    first, diagnosis = view.get("first_failure"), view.get("diagnosis") or view.get("cause")
    if view["verdict"] == "INCONCLUSIVE":
        reasons = [_text_of(reason) for reason in view["reasons"]]
        lines += [f"reason: {reason}" for reason in reasons[:_MOST_REASONS]]
        if len(reasons) > _MOST_REASONS:
            lines.append(f"and {len(reasons) - _MOST_REASONS} more reasons, in the report")
    else:
        lines.append(str(conclusion))
    if first:
        lines.append(f"first failure: {_text_of(first)}")
    if isinstance(diagnosis, dict):
        lines.append(f"cause: {diagnosis.get('cause') or diagnosis.get('name')}: {diagnosis['text']}")
        if diagnosis.get("shape"):
            lines.append(f"shape: {_text_of(diagnosis['shape'])}")
    elif diagnosis:
        lines.append(f"cause: {diagnosis}")
    if path is not None:
        lines.append(f"report: {path / ('report.html' if (path / 'report.html').exists() else 'report.md')}")
    return [shorten(line, _WIDTH, placeholder=" ...") for line in lines]


def _subject(view: dict[str, Any]) -> str:
    """What a report is about, in a name."""
    if "report" in view:
        return "A against B"
    return str(view.get("model") or view.get("server", {}).get("model", "server"))


def _text_of(item: Any) -> str:
    """The sentence of an entry that is one, or has one."""
    return str(item.get("text", item)) if isinstance(item, dict) else str(item)
