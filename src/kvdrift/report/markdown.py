"""report.md: the view as Markdown, in the layout that the project was founded on."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvdrift.report.view import View, figure, yes_no

_INTERPRETATION = {
    "k": "True: the key rows that decode read are those that prefill wrote",
    "v": "True: the value rows that decode read are those that prefill wrote",
    "aligned": "True: K and V both match",
}


def render_markdown(view: View) -> str:
    """Return the report of `view` as Markdown."""
    environment = Environment(
        loader=PackageLoader("kvdrift.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # Markdown, not HTML; `cell` escapes what tables cannot hold
    )
    environment.filters |= {"figure": figure, "yes_no": yes_no, "cell": _cell, "tick": _tick, "short": _short}
    return environment.get_template("report.md.jinja").render(
        view=view,
        note=_note,
        layer_zero=_first_layer(view),
        interpretation=_INTERPRETATION,
        alignment_modes=list(view["kv_alignment"]),
    )


def _cell(value: object) -> str:
    """Keep a value inside its table cell."""
    return str(value).replace("|", "\\|").replace("\n", " ")


def _tick(value: bool) -> str:
    return "✓" if value else ""


def _short(sha256: str | None) -> str:
    return "not measured" if sha256 is None else f"`{sha256[:16]}`"


def _note(entry: dict[str, Any]) -> str:
    """Say in words how the projections of prefill and decode compare."""
    if entry["n_exact"] == entry["n_positions"]:
        return f"bit-exact at all {entry['n_positions']} positions"
    excess = entry["excess"]
    beyond = "beyond" if not excess <= 1.0 else "within"
    return f"max {figure(entry['max_ulp'])} ULP, relative {figure(entry['max_rel_l2'])}; excess {figure(excess)}, {beyond} noise"


def _first_layer(view: View) -> int | None:
    layers = [entry["layer"] for entry in view["projection_hashes"]]
    return min(layers, default=None)
