"""report.html: the view and its pictures as one page that opens offline. Nothing in it is fetched from anywhere."""

from __future__ import annotations

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvdrift.report import charts as pictures
from kvdrift.report.markdown import MEANING, note_of_projection
from kvdrift.report.view import View, figure, yes_no
from kvdrift.verdict.charts import Charts
from kvdrift.vocabulary.plan import Mode

# What a verdict is marked with beside its colour.
SIGN = {"EXACT": "=", "STRUCTURAL_DRIFT": "≈", "MISMATCH": "≠", "INCONCLUSIVE": "?"}


def render_html(view: View, charts: Charts) -> str:
    """Return the report of `view` as one page of HTML."""
    environment = Environment(
        loader=PackageLoader("kvdrift.report"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )
    environment.filters |= {"figure": figure, "yes_no": yes_no, "note": note_of_projection}
    # Aligned inputs first: nothing is inherited there.
    modes = sorted(charts.modes.items(), key=lambda item: item[0] != Mode.KV_ALIGNED)
    return environment.get_template("report.html.jinja").render(
        view=view,
        charts=charts,
        modes=modes,
        meaning=MEANING[view["verdict"]],
        sign=SIGN[view["verdict"]],
        heat_maps={name: pictures.heat_map(charts, mode) for name, mode in modes},
        classes={name: [pictures.class_of(cell) for cell in mode.cells] for name, mode in modes},
        precision=pictures.precision_chart(modes),
        through=pictures.line_chart(modes, "through", "layer", "Drift through the layers"),
        along=pictures.line_chart(modes, "along", "decode step", "Drift along the decode span"),
        attention=None if charts.attention is None else pictures.attention_chart(charts.attention),
        cache=pictures.cache_map(charts),
        evidence=_evidence(view),
    )


def _evidence(view: View) -> list[dict[str, Any]]:
    """The instruments' own figures, beyond noise first."""
    order = {"H1": 0, None: 1, "H0": 2}
    return sorted(view["instruments"], key=lambda item: order[item["supports"]])
