"""The panel that a result ends in: verdict, what it is about, first failure, cause, a strip of layers, the report."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from kvdrift.cli.screen import Screen
from kvdrift.report.markdown import meaning_of

View = Mapping[str, Any]

_COLOURS = {"EXACT": "green", "STRUCTURAL_DRIFT": "green", "MISMATCH": "red", "INCONCLUSIVE": "yellow"}
_SIGNS = {"EXACT": "=", "STRUCTURAL_DRIFT": "≈", "MISMATCH": "≠", "INCONCLUSIVE": "?"}
# The marks of a strip: unicode, ASCII and colour.
_MARKS = {
    "equal": ("·", ".", "default"),
    "within": ("▂", "-", "blue"),
    "unknown": ("░", "?", "default"),
    "beyond": ("█", "#", "red"),
    "first": ("◆", "X", "red bold"),
}
_LEGEND = {
    "equal": "equal bits",
    "within": "within noise",
    "unknown": "no bound",
    "beyond": "beyond noise",
    "first": "first failure",
}
_WORST = ("equal", "within", "unknown", "beyond", "first")
_MOST_REASONS = 3
# Names of facts stand beside them from this width on, above them below it.
_BESIDE = 60


def panel(view: View, path: Path | None, screen: Screen) -> str:
    """Return the panel of a report.

    Args:
        view: a report as plain data, that of a server too.
        path: the run directory, None if none was written.
        screen: where it is shown; without a frame the facts stand alone.
    """
    verdict = view["verdict"]
    kind = view.get("kind")
    title = f"{verdict}{f' ({kind})' if kind and kind != 'server' else ''}"
    facts = list(_facts(view, path))
    if not screen.framed:
        head = Text(screen.text(f"{title}: {meaning_of(view)}"))
        return screen.render(head, *(_fact(name, value, screen) for name, value in facts))
    colour = _COLOURS[verdict]
    sign = f"{_SIGNS[verdict]} " if screen.unicode else ""
    body = Group(Text(screen.text(meaning_of(view)), style="bold"), *(_fact(n, v, screen) for n, v in facts))
    return screen.render(
        Panel(
            body,
            title=Text(f"{sign}{title}", style=f"bold {colour}"),
            title_align="left",
            border_style=colour,
            box=box.ROUNDED if screen.unicode else box.ASCII,
            width=screen.width,
        )
    )


def _facts(view: View, path: Path | None) -> Iterator[tuple[str, str | list[dict[str, Any]]]]:
    """The facts of a report by name, each a text; the strip is a list."""
    if "model" in view:
        yield "model", str(view["model"] or "unknown")
    if view.get("scope"):
        yield "scope", f"{view['scope']}, and nothing beyond it"
    if view.get("about"):
        yield "about", str(view["about"])
    elif view.get("conclusion"):
        yield "about", str(view["conclusion"])
    if "guilty" in view and view["verdict"] == "MISMATCH":
        yield "who is off", _guilty(view)
    if view.get("first_failure"):
        yield "first failure", _sentence(view["first_failure"])
    diagnosis = view.get("diagnosis") or view.get("cause")
    if isinstance(diagnosis, dict):
        name = diagnosis.get("cause") or diagnosis.get("name")
        yield "cause", ": ".join(str(part) for part in (name, diagnosis.get("text")) if part)
        if diagnosis.get("shape"):
            yield "shape", _sentence(diagnosis["shape"])
    elif diagnosis:
        yield "cause", str(diagnosis)
    if view["verdict"] == "INCONCLUSIVE":
        reasons = [_sentence(reason) for reason in view["reasons"]]
        yield from (("why", reason) for reason in reasons[:_MOST_REASONS])
        if len(reasons) > _MOST_REASONS:
            yield "why", f"and {len(reasons) - _MOST_REASONS} more reasons, in the report"
    if view.get("strip"):
        yield "layers", list(view["strip"])
    if path is not None:
        yield "report", place_of(path)


def _guilty(view: View) -> str:
    """Which of two sides is off, as reports of engines and of logprobs have it."""
    found = view["guilty"]
    if isinstance(found, dict):
        return str(found["text"])
    if found is None:
        return "not known" if view.get("report") == "compare-logprobs" else "neither alone"
    return f"{found}{', in its ' + view['guilty_pass'] if view.get('guilty_pass') else ''}"


def _sentence(item: Any) -> str:
    return str(item.get("text", item)) if isinstance(item, dict) else str(item)


def place_of(run: Path) -> str:
    """Return the path of the report in a run directory, from the working directory if it lies inside."""
    page = run / ("report.html" if (run / "report.html").exists() else "report.md")
    inside = os.path.relpath(page)
    return str(page) if inside.startswith("..") else inside


def _fact(name: str, value: str | list[dict[str, Any]], screen: Screen) -> RenderableType:
    wide = screen.width >= _BESIDE
    inner = screen.width - (4 if screen.framed else 0) - (15 if wide else 2)
    if isinstance(value, list):
        shown: RenderableType = strip(value, inner, screen)
    else:
        shown = Text(screen.text(value), overflow="fold")
    label = Text(f"{name}:", style="dim" if screen.coloured else "")
    if not wide:
        return Group(label, Padding(shown, (0, 0, 0, 2)))
    grid = Table.grid(padding=(0, 1, 0, 0), expand=False)
    grid.add_column(width=14, no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(label, shown)
    return grid


def strip(marks: Sequence[Mapping[str, Any]], width: int, screen: Screen) -> RenderableType:
    """Return one character for each column of the model (embedding, layers, head) and what they mean.

    With more columns than `width` a character stands for several, and is that of the worst.
    """
    n_each = max(1, -(-len(marks) // max(1, width)))
    worst = [
        max((mark["state"] for mark in marks[start : start + n_each]), key=_WORST.index)
        for start in range(0, len(marks), n_each)
    ]
    line = Text(no_wrap=True, overflow="crop")
    for state in worst:
        line.append(_MARKS[state][0 if screen.unicode else 1], style=_MARKS[state][2])
    each = f", {n_each} a mark" if n_each > 1 else ""
    said = f"{marks[0]['name']} to {marks[-1]['name']}{each}; "
    legend = Text(said, style="dim" if screen.coloured else "", overflow="fold")
    known = [state for state in _WORST if state in worst]
    for i, state in enumerate(known):
        legend.append(_MARKS[state][0 if screen.unicode else 1], style=_MARKS[state][2])
        legend.append(f" {_LEGEND[state]}{', ' if i + 1 < len(known) else ''}")
    return Group(line, legend)
