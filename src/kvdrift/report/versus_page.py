"""report.html of two engines: who is off, where they part, maps of A against B and of each against itself."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from kvdrift.report import charts as pictures
from kvdrift.report.html import SIGN, page_environment
from kvdrift.report.markdown import MEANING_OF_ENGINES
from kvdrift.report.view import figure
from kvdrift.verdict.charts import Cell, Line, ModeCharts
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.sites import Site

# Sites that drift is followed through, the best first.
_THROUGH = (Site.LAYER_OUT, Site.RESID_ATTN, Site.LAYER_IN, Site.MLP_OUT, Site.ATTN_OUT)


def render_versus_html(view: Mapping[str, Any]) -> str:
    """Return the report of two engines as one page of HTML that fetches nothing.

    Args:
        view: the report as plain data, of schema "engines".
    """
    # Where something parts comes first.
    ordered = sorted(view["maps"], key=lambda item: item["first"] is None)
    maps = [(item["what"], [_cell(cell) for cell in item["cells"]], item) for item in ordered]
    site = next(
        (s for s in _THROUGH if any(c.place.site is s and c.place.layer for _, cells, _ in maps for c in cells)), None
    )
    return (
        page_environment()
        .get_template("versus.html.jinja")
        .render(
            view=view,
            meaning=MEANING_OF_ENGINES[view["verdict"]],
            sign=SIGN[view["verdict"]],
            heat_maps=[(what, _heat_map(cells, item, view["n_layers"]), item) for what, cells, item in maps],
            site=site,
            through=_through([(what, cells) for what, cells, _ in maps], site),
            is_off=_who(view),
        )
    )


def _who(view: Mapping[str, Any]) -> str | None:
    """Who is off, in a word or two; None for a verdict that accuses nobody."""
    if view["verdict"] != "MISMATCH":
        return None
    if view["guilty"] is not None:
        return f"{view['guilty']}{', in its ' + view['guilty_pass'] if view['guilty_pass'] else ', in both passes'}"
    if view["cause"] is not None and view["cause"]["name"] == "both_contradict_themselves":
        return "both: in each, decode is not what prefill computes"
    return "neither by itself: both are consistent, and they compute different functions"


def _cell(cell: Mapping[str, Any]) -> Cell:
    """A cell of the maps that audits have; a difference without consequence has no class of its own."""
    is_idle = cell["state"] == "convention"
    return Cell(
        place=Place(cell["layer"], Site(cell["site"])),
        excess=None if is_idle else cell["excess"],
        bound=cell["bound"],
        drift=cell["drift"],
        ulp=math.nan,
        n_pairs=cell["n"],
        n_exact=cell["n_equal"],
        worst=Address.parse(cell["worst"]),
        sha256_prefill=None,
        sha256_decode=None,
        is_beyond=cell["state"] == "beyond",
        is_judged=not is_idle,
    )


def _heat_map(cells: list[Cell], item: Mapping[str, Any], n_layers: int) -> Markup:
    first = item["first"]
    place = None if first is None else Place(first["layer"], Site(first["site"]))
    layers = [cell.place.layer for cell in cells if cell.place.layer is not None]
    return pictures.heat_map(cells, max([n_layers, *(layer + 1 for layer in layers)]), place, _tell)


def _tell(cell: Cell) -> str:
    judged = f"bound {figure(cell.bound)}, " + (
        f"excess {figure(cell.excess)}" if cell.is_judged else "and without consequence: what is computed of it agrees"
    )
    return "\n".join(
        (
            str(cell.worst),
            f"difference {figure(cell.drift)} (relative, largest of {cell.n_pairs})",
            judged,
            f"{cell.n_exact} of {cell.n_pairs} values are equal",
        )
    )


def _through(maps: list[tuple[str, list[Cell]]], site: Site | None) -> Markup | None:
    """The largest difference by layer at one site, a line a map."""
    charts = []
    for what, cells in maps:
        found = [cell for cell in cells if cell.place.site is site and cell.place.layer is not None]
        layers = tuple(cell.place.layer for cell in found if cell.place.layer is not None)
        line = Line("largest", layers, tuple(cell.drift if math.isfinite(cell.drift) else 0.0 for cell in found))
        charts.append((what, ModeCharts(cells=(), rungs=(), site_through=site, through=(line,), along=())))
    return pictures.line_chart(charts, "through", "layer", "Differences through the layers")
