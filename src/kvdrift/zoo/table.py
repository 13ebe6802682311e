"""The rows of the zoo as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from kvdrift.report.schema.others import ZooRowView
from kvdrift.zoo.explained import explained

_PAGE = """# {title}

{about}
The command writes this page; changes here are lost.

<!-- not run: takes minutes; tests/zoo runs it for single types -->

    {command}

{versions}. {n_rows} types: {counts}. {minutes} min, one after the other.

A MISMATCH here has not been confirmed unless [findings](findings/README.md) names it: it may be an error of the model,
of the way in which it was made small, or of kvdrift.{signs}

{head}
{rows}

{why}
"""
_SIGNS = """ Of each scenario: `=` a pass, `≠` a MISMATCH, `?` INCONCLUSIVE,
nothing where it does not apply."""
_TITLES = {"hf": "The zoo", "mlx": "The zoo of mlx-lm"}
_ABOUT = {
    "hf": """Every type of causal language model that transformers has registered, as a tiny random model: the default
configuration made small, a layer of each kind, a window shorter than the prompt, weights scaled so that attention is
peaked. Each is audited in float32 with the precision ladder.""",
    "mlx": """Every type of model that mlx-lm has, as a tiny random model: arguments made small by their names, four
layers, a window shorter than the prompt, weights scaled so that attention is peaked. Each is audited in float32 with
the precision ladder, on the CPU kernels of mlx. A type with a tower for pictures stands here with its text decoder.""",
}
_EXPLAINED = """## Why they do not pass

| what | finding, or reason |
|---|---|
{lines}

Without an explanation: {left}."""
_WHY = "first failure, or why there is no verdict"
_PASSES = ("EXACT", "STRUCTURAL_DRIFT")
_SIGN = {"EXACT": "=", "STRUCTURAL_DRIFT": "=", "MISMATCH": "≠", "INCONCLUSIVE": "?"}


def page(rows: Sequence[ZooRowView], command: str, versions: Mapping[str, str], engine: str = "hf") -> str:
    """Return the Markdown page of the rows, in the order of their types, with a column for each scenario."""
    ordered = sorted(rows, key=lambda row: row.type)
    scenarios = list(dict.fromkeys(name for row in ordered for name in row.scenarios if name != "decode"))
    names = ("type", "parameters", "cache", "plain decode", "excess", *scenarios, _WHY)
    return _PAGE.format(
        title=_TITLES[engine],
        about=_ABOUT[engine],
        signs=_SIGNS if scenarios else "",
        head="| " + " | ".join(names) + " |\n" + "|---" * len(names) + "|",
        command=command,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
        n_rows=len(ordered),
        counts=counts(ordered),
        minutes=round(sum(row.seconds for row in ordered) / 60.0),
        rows="\n".join(_row(row, scenarios) for row in ordered),
        why=_explained(ordered, engine),
    )


def _explained(rows: Sequence[ZooRowView], engine: str) -> str:
    """Return the findings and reasons of the cells that do not pass, and which cells have none."""
    needed, left = explained(rows, engine)
    lines = []
    for each, what in needed:
        page_of = f"[{each.finding}](findings/{each.finding}.md)" if each.finding else ""
        lines.append(f"| {what} | {'; '.join(filter(None, (page_of, each.reason)))} |")
    return _EXPLAINED.format(lines="\n".join(lines), left=", ".join(left) or "nothing")


def counts(rows: Sequence[ZooRowView]) -> str:
    """Return how many rows end in what, the commonest first.

    >>> made = {"scenarios": [], "transformers": "5"}
    >>> counts([ZooRowView(type=state, state=state, **made) for state in ("EXACT", "ERROR", "EXACT")])
    '2 EXACT, 1 ERROR'
    """
    return ", ".join(f"{n} {state}" for state, n in Counter(row.state for row in rows).most_common())


def _row(row: ZooRowView, scenarios: Sequence[str]) -> str:
    cells = (
        row.type,
        "" if row.parameters is None else f"{row.parameters:,}",
        row.cache or "",
        row.state,
        "" if row.excess is None else f"{row.excess:.2g}",
        *(_SIGN.get(row.verdicts.get(name, ""), "") for name in scenarios),
        row.first_failure or row.reason or "",
    )
    return "| " + " | ".join(_escaped(cell) for cell in cells) + " |"


def others(row: ZooRowView) -> str:
    """Return how many scenarios pass, and by name those that do not."""
    passed = sum(verdict in _PASSES for verdict in row.verdicts.values())
    named = [f"{name} {verdict}" for name, verdict in row.verdicts.items() if verdict not in _PASSES]
    return ", ".join([*([f"{passed} pass"] if row.verdicts else []), *named])


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("`", "'").replace("\n", " ")
