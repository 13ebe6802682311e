"""report.html: the view and its pictures as one page that opens offline. Nothing in it is fetched from anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from kvdrift.report import charts as pictures
from kvdrift.report.markdown import MEANING, note_of_projection
from kvdrift.report.producers import Step, anchor, inputs_of_cells, walk_back
from kvdrift.report.view import View, figure, yes_no
from kvdrift.verdict.charts import Charts, ModeCharts
from kvdrift.vocabulary.plan import Mode

# What a verdict is marked with beside its colour.
SIGN = {"EXACT": "=", "STRUCTURAL_DRIFT": "≈", "MISMATCH": "≠", "INCONCLUSIVE": "?"}


def render_html(view: View, charts: Charts) -> str:
    """Return the report of `view` as one page of HTML."""
    # Aligned inputs first: nothing is inherited there.
    modes = sorted(charts.modes.items(), key=lambda item: item[0] != Mode.KV_ALIGNED)
    first = None if charts.first is None else charts.first.place
    return (
        page_environment()
        .get_template("report.html.jinja")
        .render(
            view=view,
            charts=charts,
            modes=modes,
            meaning=MEANING[view["verdict"]],
            sign=SIGN[view["verdict"]],
            heat_maps={name: pictures.heat_map(mode.cells, charts.n_layers, first) for name, mode in modes},
            inputs={name: inputs_of_cells(mode.cells) for name, mode in modes},
            walk=_walk(charts, modes),
            precision=pictures.precision_chart(modes),
            through=pictures.line_chart(modes, "through", "layer", "Drift through the layers"),
            along=pictures.line_chart(modes, "along", "decode step", "Drift along the decode span"),
            error=None if charts.error is None else pictures.error_chart(charts.error),
            attention=None if charts.attention is None else pictures.attention_chart(charts.attention),
            cache=pictures.cache_map(charts),
            by_length=None if not view["lengths"] else pictures.lengths_chart(view["lengths"]),
            evidence=_evidence(view),
        )
    )


@cache
def page_environment() -> Environment:
    """Return what renders pages: everything is escaped, and a name that is missing is an error.

    It is kept with the templates that it compiled.
    """
    environment = Environment(
        loader=PackageLoader("kvdrift.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"figure": _number, "yes_no": yes_no, "note": note_of_projection, "code": _code}
    environment.globals["anchor"] = anchor
    return environment


def _code(text: str) -> Markup:
    """Set what stands between backticks as code; everything is escaped."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without a partner
        return escape(text)
    return Markup("").join(
        Markup("<code>{}</code>").format(part) if i % 2 else escape(part) for i, part in enumerate(parts)
    )


def _number(value: float | None) -> str:
    """A figure that is not broken at its minus sign."""
    text = figure(value)
    return Markup('<span class="n">{}</span>').format(text) if "e-" in text else text


def _walk(charts: Charts, modes: Sequence[tuple[str, ModeCharts]]) -> tuple[str, list[Step]] | None:
    """The mode in which the first failure shows, aligned inputs first, and the walk back from it; None without one."""
    if charts.first is None:
        return None
    found = ((name, list(walk_back(mode.cells, charts.first.place))) for name, mode in modes)
    return next(((name, steps) for name, steps in found if steps and steps[0].cell.state == "beyond"), None)


def _evidence(view: View) -> list[dict[str, Any]]:
    """The instruments' own figures, beyond noise first."""
    order = {"H1": 0, None: 1, "H0": 2}
    return sorted(view["instruments"], key=lambda item: order[item["supports"]])
