"""report.html of two dumps of logprobs."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kvdrift.logprobs.compare import LogprobComparison
from kvdrift.report.schema import check
from tests.cli.test_report_in_browser import HOSTILE, opened
from tests.logprobs.test_verdicts import compared
from tests.support.logprobs import Sides, simulate, write

pytestmark = pytest.mark.xdist_group("logprobs_page")


@pytest.fixture
def drifting(tmp_path: Path) -> LogprobComparison:
    """Sequence s3 drifts from token 20 on; every other one is as far apart as rounding makes it."""
    sides: Sides = simulate()
    values = sides.logprobs("trainer")
    values[3, 20:] -= 1.5
    return compared(tmp_path, sides, values)


def test_the_page_has_verdict_place_and_pictures(drifting: LogprobComparison, tmp_path: Path) -> None:
    page = drifting.to_html()

    assert drifting.verdict == "MISMATCH"
    assert drifting.view["first_failure"]["text"] in page
    dom, console = opened(page, tmp_path)
    assert console == ""
    assert dom.count('class="c x2"') == 1, "one sequence is beyond"
    assert '<svg class="sequences"' in dom
    assert '<svg class="plot"' in dom
    title = re.search("<title>(.*?)</title>", dom)
    assert title is not None
    assert title[1].split(" | ")[0] == "sequence s3"


def test_drift_along_the_tokens_begins_where_it_begins(drifting: LogprobComparison) -> None:
    rows = drifting.view["along"]

    assert [row["first"] for row in rows] == list(range(0, 40, 2))
    assert all(row["n"] == 48 for row in rows)
    before, after = (np.array([r["rms"] for r in rows if (r["first"] >= 20) is late]) for late in (False, True))
    assert after.min() > 1.5 * before.max()


def test_a_run_directory_holds_the_page(tmp_path: Path) -> None:
    found = compared(tmp_path, simulate(), out=tmp_path / "run")

    assert found.verdict == "STRUCTURAL_DRIFT"
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == found.to_html()
    assert '<rect class="c x2"' not in found.to_html()
    check("logprobs", (tmp_path / "run" / "report.json").read_text(encoding="utf-8"))


def test_figures_that_are_none_and_names_that_are_hostile(tmp_path: Path) -> None:
    sides = simulate()
    values = sides.logprobs("trainer")
    values[0, 0] = -np.inf
    found = compared(tmp_path, sides, values)
    view = json.loads(found.to_json())
    view["sequences"][0]["name"] = HOSTILE
    found = replace(found, view={**found.view, "sequences": [{**found.view["sequences"][0], "name": HOSTILE}]})

    dom, console = opened(found.to_html(), tmp_path)

    assert console == ""
    assert dom.count("<script>") == 2
    assert "&lt;img src=x" in dom


def test_nothing_that_counts_is_a_page_without_pictures(tmp_path: Path) -> None:
    sides = simulate(n=2)
    found = compared(tmp_path, sides, np.full_like(sides.logprobs("trainer"), np.nan))

    assert found.view["along"] == []
    assert '<svg class="plot"' not in found.to_html()


def test_a_dump_is_written_as_the_page_names_it(tmp_path: Path) -> None:
    sides = simulate()
    path = write(tmp_path / "a & b.jsonl", sides.tokens, sides.logprobs("sampler"))
    other = write(tmp_path / "c.jsonl", sides.tokens, sides.logprobs("trainer"))
    from kvdrift.logprobs.compare import compare_logprobs

    assert "a &amp; b.jsonl" in compare_logprobs(str(path), str(other)).to_html()
