"""report.html and report.json of two engines: what a reader is told, where, and that it opens in a browser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.report.schema import check
from kvdrift.report.versus_page import render_versus_html
from kvdrift.versus.compare import EngineComparison
from kvdrift_bench.models.tiny import lively_model
from tests.cli.test_report_in_browser import HOSTILE, opened
from tests.support.command import kvdrift as command
from tests.versus.test_engines import changed, compared, tiny

pytestmark = pytest.mark.xdist_group("versus_page")


@pytest.fixture(scope="module")
def guilty() -> EngineComparison:
    bad = tiny()
    with changed(bad.model.layers[1].self_attn.v_proj, lambda y: y * 1.001, when="decode"):
        return compared(bad, tiny())


def states(view: dict[str, Any], what: str) -> dict[str, str]:
    cells = next(item for item in view["maps"] if item["what"] == what)["cells"]
    return {f"{cell['layer']} {cell['site']}": cell["state"] for cell in cells}


def test_the_maps_are_beyond_from_the_fault_on_and_quiet_elsewhere(guilty: EngineComparison) -> None:
    view = guilty.view
    own, across = states(view, "A against itself"), states(view, "A prefill against B prefill")

    assert next(name for name, state in own.items() if state == "beyond") == "1 v_proj"
    assert {own[f"0 {site}"] for site in ("q_proj", "attn_ctx", "layer_out")} <= {"equal", "within"}
    assert own["None logits"] == "beyond"
    assert set(across.values()) == {"equal"}
    assert set(states(view, "B against itself").values()) <= {"equal", "within"}
    firsts = {item["what"]: item["first"] and item["first"]["text"] for item in view["maps"]}
    assert firsts == {
        "A prefill against B prefill": None,
        "A against itself": "p / pos 8 / layer 1 / v_proj",
        "B against itself": None,
    }
    assert view["weights"] == {
        "same": True, "n_rows": 4, "drift": 0.0,
        "text": "the bytes of all weights are the same (SHA-256); 4 rows of the embedding are equal",
    }  # fmt: skip


def test_the_page_says_who_is_off_where_and_why(guilty: EngineComparison, tmp_path: Path) -> None:
    page = guilty.to_html()

    for part in (
        "<strong>A, in its decode</strong>",
        "<code>p / pos 8 / layer 1 / v_proj</code>",
        "prefill and decode of A differ, its prefill agrees with B",
        "Every site that one side has, the other has too",
        "Same weights: the bytes of all weights are the same",
    ):
        assert part in page, part
    dom, console = opened(page, tmp_path)
    assert console == ""
    assert dom.count('<svg class="heat"') == 3
    assert '<svg class="plot"' in dom
    assert dom.count('class="first"') == 1
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert all(title[1].split(" | ")), "a picture says nothing"


def test_other_weights_and_settings_stand_in_the_page() -> None:
    other = tiny(rms_norm_eps=1e-3)
    with torch.no_grad():
        other.model.embed_tokens.weight[5:50] *= 1.5
    found = compared(tiny(), other)

    assert found.verdict == "MISMATCH"
    assert found.view["weights"]["same"] is None
    assert "rows of the embedding differ by up to 0.5" in found.view["weights"]["text"]
    page = found.to_html()
    assert "<td>1e-06</td><td>0.001</td>" in page
    assert "neither by itself: both are consistent, and they compute different functions" in page


def test_a_run_directory_holds_the_page_and_the_report_is_of_its_schema(here: Path) -> None:
    found = compared(tiny(), tiny(), out=here / "run")

    assert found.path == here / "run"
    assert {path.name for path in (here / "run").iterdir()} == {"report.html", "report.json", "report.md"}
    assert (here / "run" / "report.html").read_text(encoding="utf-8") == found.to_html()
    check("engines", (here / "run" / "report.json").read_text(encoding="utf-8"))
    assert found.summary().endswith(f"report: {here / 'run' / 'report.html'}\n")
    shown = command("show", "run")
    assert shown.code == 0
    assert "A and B compute one function" in shown.out
    check("engines", command("show", "run", "--json").out)


def test_a_value_that_is_no_number_is_beyond_and_the_report_strict() -> None:
    bad = tiny()
    with changed(bad.model.layers[1].mlp, lambda y: y * float("nan"), when="decode"):
        found = compared(bad, tiny())

    assert states(found.view, "A against itself")["1 mlp_out"] == "beyond"
    json.loads(found.to_json(), parse_constant=pytest.fail)
    check("engines", found.to_json())
    assert '<rect class="c x2"' in found.to_html()


def test_what_one_side_keeps_in_another_form_has_a_mark_of_its_own(guilty: EngineComparison) -> None:
    view = json.loads(guilty.to_json())
    cell = view["maps"][0]["cells"][3]
    cell.update(state="convention", drift=0.5, excess=1e9, n_equal=0)

    page = render_versus_html(view)

    assert '<rect class="c u"' in page
    assert "and without consequence: what is computed of it agrees" in page


def test_names_are_text(tmp_path: Path) -> None:
    found = kvdrift.compare(tiny(), tiny(), prompts={HOSTILE: list(range(3, 9))})
    assert isinstance(found, EngineComparison)

    dom, console = opened(found.to_html(), tmp_path)

    assert console == ""
    assert dom.count("<script>") == 2
    assert "<img" not in dom


def test_an_inconclusive_page_has_its_reasons(guilty: EngineComparison) -> None:
    view = {
        **guilty.view, "verdict": "INCONCLUSIVE", "reasons": ["A has no logits"], "maps": [], "partings": [],
        "first_failure": None, "cause": None, "guilty": None, "guilty_pass": None,
    }  # fmt: skip

    page = render_versus_html(view)

    assert "<li>A has no logits</li>" in page
    assert "Nothing was compared" in page
    assert "nowhere beyond what rounding may do" in page


def test_a_model_of_more_layers_is_drawn_whole() -> None:
    one, two = (lively_model("llama", torch.float32, num_hidden_layers=5) for _ in range(2))

    assert compared(one, two).to_html().count("layer 4 / mlp_out\n") == 3
