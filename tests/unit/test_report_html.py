"""report.html without a browser: what it is made of, and that the text of the report is in it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from markupsafe import escape

from kvdrift.pipeline.audit import Audit
from kvdrift.report.charts import class_of, heat_map, line_chart, precision_chart, tell
from kvdrift.report.html import render_html
from kvdrift.verdict.charts import Cell, Charts, Line, ModeCharts, RungDrift, build_charts
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.sites import Site
from tests.support.audits import audited

pytestmark = pytest.mark.xdist_group("slot_stale")


def cell(layer: int = 0, site: Site = Site.MLP_OUT, **values: object) -> Cell:
    facts = {
        "place": Place(layer, site),
        "excess": 0.5,
        "bound": 1e-10,
        "drift": 1e-3,
        "ulp": 2.0,
        "n_pairs": 4,
        "n_exact": 1,
        "worst": Address("p", 7, layer, site),
        "sha256_prefill": "a" * 64,
        "sha256_decode": "b" * 64,
        "is_beyond": False,
    }
    return Cell(**{**facts, **values})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def stale() -> Audit:
    return audited("slot_stale").audit


@pytest.mark.parametrize(
    ("values", "css"),
    [
        ({"excess": 1e-7}, "w0"),
        ({"excess": 1.0}, "w4"),
        ({"excess": 1.1}, "x0"),
        ({"excess": 5e3}, "x2"),
        ({"excess": float("nan")}, "x2"),
        ({"excess": 0.1, "is_beyond": True}, "x2"),
        ({"excess": None}, "u"),
        ({"excess": 0.0, "n_exact": 4}, "e"),
        ({"excess": 3.0, "n_exact": 4}, "x0"),
    ],
)
def test_a_cell_has_the_class_of_its_excess(values: dict[str, object], css: str) -> None:
    assert class_of(cell(**values)) == css  # type: ignore[arg-type]


def test_a_cell_tells_address_drift_bound_and_hashes() -> None:
    text = tell(cell())

    assert text.splitlines()[0] == "p / pos 7 / layer 0 / mlp_out"
    for part in ("0.001", "2 ULP", "1.00e-10", "1 of 4 pairs", "a" * 12, "b" * 12):
        assert part in text


def test_the_first_failure_is_framed_in_its_cell(stale: Audit) -> None:
    charts = build_charts(stale.suite.judged)
    mode = charts.modes["kv_aligned"]

    svg = str(heat_map(charts, mode))

    first = re.search('data-t="[^"]*layer 2 / k_cache[^"]*"/><rect class="first" x="([^"]+)" y="([^"]+)"', svg)
    assert first is not None
    assert charts.first is not None
    assert charts.first.place == Place(2, Site.K_CACHE)
    assert svg.count('class="c ') == len(mode.cells)


def test_the_first_failure_begins_what_is_beyond(stale: Audit) -> None:
    charts = build_charts(stale.suite.judged)
    beyond = [item.place for item in charts.modes["kv_aligned"].cells if item.is_beyond]

    assert beyond[0] == Place(2, Site.K_CACHE)
    assert {(item.layer, item.slot) for item in charts.bad_slots if item.site is Site.K_CACHE} == {(2, 5)}


def test_attention_pairs_the_keys_of_both_passes(stale: Audit) -> None:
    """Prefill of several tokens has columns for later keys, which decode has not."""
    row = build_charts(stale.suite.judged).attention

    assert row is not None
    assert row.slots == tuple(range(12))
    assert np.isclose(sum(row.prefill), 1.0)
    assert int(np.abs(np.subtract(row.decode, row.prefill)).argmax()) == 5


def test_every_sentence_of_the_report_is_in_the_page(stale: Audit) -> None:
    page = stale.to_html()

    assert "http" not in page.replace("http://www.w3.org/2000/svg", "").replace("http-equiv", "")
    for part in (*stale.view["recommendations"], stale.view["hypotheses"]["conclusion"]):
        assert escape(part) in page
    assert stale.view["first_failure"]["text"] in page


def test_size_is_bounded_by_layers_and_not_by_positions() -> None:
    """100 layers and every site, in both modes: the page of a large model stays below 8 MB."""
    view = audited("slot_stale").audit.view
    cells = tuple(cell(layer, site) for layer in range(100) for site in Site if site is not Site.LOGITS)
    mode = ModeCharts(
        cells=cells,
        rungs=(RungDrift(rung="float64", unit=1e-16, median=1e-15, largest=1e-14, bound=1e-11),),
        site_through=Site.LAYER_OUT,
        through=(Line("bfloat16", tuple(range(100)), (1e-3,) * 100),),
        along=(Line("bfloat16", tuple(range(1000)), (1e-3,) * 1000),),
    )
    modes = {"as_designed": mode, "kv_aligned": mode}
    page = render_html(view, Charts(modes=modes, first=None, n_layers=100, attention=None, bad_slots=(), n_cached=1000))

    assert 1 << 20 < len(page.encode()) < 8 << 20


def test_a_chart_of_one_point_is_not_drawn() -> None:
    mode = ModeCharts(
        cells=(cell(),),
        rungs=(RungDrift(rung="float64", unit=1e-16, median=1e-15, largest=1e-14, bound=None),),
        site_through=Site.LAYER_OUT,
        through=(Line("bfloat16", (0,), (1e-3,)),),
        along=(),
    )

    assert precision_chart([("kv_aligned", mode)]) is None
    assert line_chart([("kv_aligned", mode)], "through", "layer", "t") is None
    two = replace(mode, through=(Line("bfloat16", (0, 1), (1e-3, 1e-2)),))
    assert line_chart([("kv_aligned", two)], "through", "layer", "t") is not None
