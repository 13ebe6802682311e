"""report.md: the view as Markdown, in the layout that the project was founded on."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvdrift.report.view import View, figure, yes_no

MEANING = {
    "EXACT": "both passes give the same bits",
    "STRUCTURAL_DRIFT": "the passes differ, and rounding explains it",
    "MISMATCH": "decode computes something else than prefill",
    "INCONCLUSIVE": "could not tell, which is not a pass",
}
# Of two engines, and of two dumps of logprobs.
MEANING_OF_ENGINES = {
    "STRUCTURAL_DRIFT": "A and B compute one function, up to rounding",
    "MISMATCH": "A and B do not compute the same",
    "INCONCLUSIVE": "could not tell, which is not a pass",
}
MEANING_OF_LOGPROBS = {
    "STRUCTURAL_DRIFT": "the dumps differ, and rounding explains it",
    "MISMATCH": "the two sides do not compute the same probabilities",
    "INCONCLUSIVE": "could not tell, which is not a pass",
}
_MEANINGS = {"compare-engines": MEANING_OF_ENGINES, "compare-logprobs": MEANING_OF_LOGPROBS}
STATUS = {"EXACT": "PASS", "STRUCTURAL_DRIFT": "PASS", "MISMATCH": "FAIL", "INCONCLUSIVE": "INCONCLUSIVE"}
_ROWS = {"k": "key rows", "v": "value rows", "aligned": "K and V"}


def meaning_of(view: Mapping[str, Any]) -> str:
    """Return what the verdict of a report means, whatever the report is about."""
    return _MEANINGS.get(view.get("report", ""), MEANING)[view["verdict"]]


def render_markdown(view: View) -> str:
    """Return the report of `view` as Markdown."""
    environment = environment_of("kvdrift.report")
    return environment.get_template("report.md.jinja").render(
        view=view,
        note=note_of_projection,
        layer_zero=_first_layer(view),
        meaning=MEANING[view["verdict"]],
        status=STATUS[view["verdict"]],
        interpret=_interpret,
        alignment_modes=list(view["kv_alignment"]),
    )


@cache
def environment_of(package: str) -> Environment:
    """Return what renders the templates of a package: Markdown, where a name that is missing is an error.

    It is kept, because to compile a template takes as long as to judge a small run.
    """
    environment = Environment(
        loader=PackageLoader(package),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `cell` escapes what tables cannot hold
    )
    environment.filters |= {
        "figure": figure,
        "yes_no": yes_no,
        "cell": _cell,
        "capitalize_first": _capitalize_first,
        "tick": _tick,
        "short": _short,
        "valid": _valid,
    }
    return environment


def _cell(value: object) -> str:
    """Keep a value inside its table cell or line, and from being read as markup."""
    text = " ".join(str(value).split())
    for character in ("\\", "|", "`", "*", "<"):
        text = text.replace(character, f"\\{character}")
    # Brackets are read as they stand, unless a link follows.
    for link in ("](", "]["):
        text = text.replace(link, f"]\\{link[1]}")
    return text or "(empty)"


def _capitalize_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def _tick(value: bool) -> str:
    return "✓" if value else ""


def _valid(row: dict[str, Any]) -> str:
    """Whether a row of the evidence table was measured as it should be."""
    if not row["measured"]:
        return "-"
    return "✗" if row["against_the_run"] else "✓"


def _interpret(key: str, item: dict[str, Any]) -> str:
    """Say in words whether the rows of K or V that decode reads are those that prefill wrote."""
    what = _ROWS[key]
    if item["bitwise"] is None:
        return f"no {what} were compared"
    if item["within_noise"] is None:
        text = f"{what}: not measured on the whole ladder"
    elif not item["within_noise"]:
        text = f"MISMATCH: the {what} that decode reads are not those that prefill wrote"
    elif item["bitwise"]:
        text = f"consistent: the {what} that decode reads are those that prefill wrote"
    else:
        text = f"consistent up to rounding: decode wrote some {what} itself"
    if key != "aligned":
        text += f"; {item['n_exact']} of {item['n_reads']} reads bit-exact"
        if item["n_lost_slots"]:
            text += f", {item['n_lost_slots']} rows missing"
    return text


def _short(sha256: str | None) -> str:
    return "not measured" if sha256 is None else f"`{sha256[:16]}`"


def note_of_projection(entry: dict[str, Any]) -> str:
    """Say in words how the projections of prefill and decode compare."""
    excess = entry["excess"]
    if excess is None:
        noise = "excess not measured"
    else:
        noise = f"excess {figure(excess)}, {'within' if excess <= 1.0 else 'beyond'} noise"
    if entry["n_exact"] == entry["n_positions"]:
        text = f"bit-exact at all {entry['n_positions']} positions"
        return text if excess is not None and excess <= 1.0 else f"{text}; {noise}"
    return f"max {figure(entry['max_ulp'])} ULP, relative {figure(entry['max_rel_l2'])}; {noise}"


def _first_layer(view: View) -> int | None:
    layers = [entry["layer"] for entry in view["projection_hashes"]]
    return min(layers, default=None)
