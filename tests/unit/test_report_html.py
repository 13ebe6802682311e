"""report.html without a browser: what it is made of, and that the text of the report is in it."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from markupsafe import escape

from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.pipeline.audit import Audit
from kvdrift.report.charts import class_of, error_chart, heat_map, line_chart, precision_chart, tell_cell
from kvdrift.report.html import page_environment, render_html
from kvdrift.report.producers import walk_back
from kvdrift.verdict.charts import Cell, Charts, Line, ModeCharts, RungDrift, build_charts
from kvdrift.verdict.error_rows import error_row
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.sites import Site, producers_of
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
        ({"excess": None, "is_judged": False}, "u"),
        ({"excess": None}, "w2"),
        ({"excess": 0.0, "n_exact": 4}, "e"),
        ({"excess": 3.0, "n_exact": 4}, "x0"),
    ],
)
def test_a_cell_has_the_class_of_its_excess(values: dict[str, object], css: str) -> None:
    assert class_of(cell(**values)) == css  # type: ignore[arg-type]


def test_a_cell_tells_address_drift_bound_and_hashes() -> None:
    text = tell_cell(cell())

    assert text.splitlines()[0] == "p / pos 7 / layer 0 / mlp_out"
    for part in ("0.001", "2 ULP", "1.00e-10", "1 of 4 pairs", "a" * 12, "b" * 12):
        assert part in text


def test_the_first_failure_is_framed_in_its_cell(stale: Audit) -> None:
    charts = build_charts(stale.suite.judged)
    mode = charts.modes["kv_aligned"]

    assert charts.first is not None
    svg = str(heat_map(mode.cells, charts.n_layers, charts.first.place))

    inside = re.search(r'class="c x2" x="([^"]+)" y="([^"]+)"[^>]*layer 2 / k_cache', svg)
    frame = re.search('<rect class="first" x="([^"]+)" y="([^"]+)"', svg)
    assert inside is not None
    assert frame is not None
    assert [float(inside[i]) - float(frame[i]) for i in (1, 2)] == [1.0, 1.0]
    assert charts.first.place == Place(2, Site.K_CACHE)
    assert svg.count('class="c ') == len(mode.cells)
    assert svg.rindex('class="c ') < frame.start(), "a cell drawn later would cover it"


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


def test_the_walk_goes_back_to_what_is_equal_and_says_where_the_error_is_made(stale: Audit) -> None:
    charts = build_charts(stale.suite.judged)
    assert charts.first is not None
    steps = list(walk_back(charts.modes["kv_aligned"].cells, charts.first.place))

    assert [str(step.cell.place) for step in steps[:4]] == [
        "layer 2 / k_cache",
        "layer 2 / k_rope",
        "layer 2 / k_proj",
        "layer 2 / attn_norm_out",
    ]
    assert [step.is_origin for step in steps] == [True] + [False] * (len(steps) - 1)
    assert [step.depth for step in steps] == sorted(step.depth for step in steps)


def test_every_link_of_the_page_leads_somewhere(stale: Audit) -> None:
    page = stale.to_html()
    names = re.findall(r' id="([^"]+)"', page)

    assert len(names) == len(set(names))
    assert set(re.findall(r'href="#([^"]+)"', page)) <= set(names)
    assert '<a href="#kv_aligned-2-k_rope">layer 2 / k_rope</a>' in page


@pytest.mark.parametrize(
    ("place", "known", "found"),
    [
        ((1, Site.LAYER_IN), {(0, Site.LAYER_OUT)}, [(0, Site.LAYER_OUT)]),
        ((0, Site.LAYER_IN), {(None, Site.EMBED_OUT)}, [(None, Site.EMBED_OUT)]),
        ((None, Site.LOGITS), {(2, Site.LAYER_OUT), (1, Site.LAYER_OUT)}, [(2, Site.LAYER_OUT)]),
        ((0, Site.ATTN_CTX), {(0, Site.LAYER_IN)}, [(0, Site.LAYER_IN)]),
        ((None, Site.EMBED_OUT), {(0, Site.LAYER_IN)}, []),
    ],
)
def test_what_was_not_recorded_gives_way_to_what_it_is_computed_from(
    place: tuple[int | None, Site], known: set[tuple[int | None, Site]], found: list[tuple[int | None, Site]]
) -> None:
    assert producers_of(*place, known) == found


def test_the_shape_of_the_error_is_drawn_from_the_values_of_both_passes(stale: Audit) -> None:
    row = build_charts(stale.suite.judged).error

    assert row is not None
    assert (str(row.address), row.slot, row.n_elements) == ("p / pos 11 / layer 2 / k_cache", 5, 32)
    assert np.abs(np.subtract(row.decode, row.prefill)).max() > 0.1
    assert "The shape of the error" in stale.to_html()


def test_an_unexplained_error_has_its_shape_in_words(stale: Audit) -> None:
    shape = {
        "extent": "tile", "heads": [1], "elements": [16, 31], "slots": [], "relation": "factor", "size": 2.0,
        "explained": 0.995, "positions": [11], "guilty": "decode", "text": "the error is in a tile",
    }  # fmt: skip
    view = {**stale.view, "diagnosis": {**stale.view["diagnosis"], "cause": "unexplained", "shape": shape}}

    page = render_html(view, build_charts(stale.suite.judged))

    for part in (
        "The error is in a tile.",
        "tile; heads 1; elements 16 to 31",
        "factor, 2; explains 99.5 %",
        "decode</dd>",
    ):
        assert part in page, part


def test_many_elements_are_shown_by_those_that_differ_most() -> None:
    values = np.zeros((2, 600))
    values[1, 599], values[1, 300] = np.nan, 1.0
    address = Address("p", 7, 0, Site.MLP_OUT)
    sides = [Values({(Site.MLP_OUT, 7): row}, {}, {}) for row in values]

    row = error_row(Suspect(address, "float32", (7,), sides[0], sides[1], None), None)

    assert row is not None
    assert len(row.at) == 256
    assert {300, 599} <= set(row.at)
    assert "NaN" in str(error_chart(row))
    assert error_row(Suspect(address, "float32", (7,), sides[0], Values({}, {}, {}), None), None) is None


def test_what_stands_between_backticks_is_code_and_escaped() -> None:
    code = page_environment().filters["code"]

    assert code("run `a <b>` now") == "run <code>a &lt;b&gt;</code> now"
    assert code("a ` b <i>") == "a ` b &lt;i&gt;"


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
