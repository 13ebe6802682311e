"""report.md of fixed runs, word for word. `pytest tests/golden --update-golden` writes the files anew."""

import math
from pathlib import Path

import pytest

from kvdrift.report.markdown import render_markdown
from kvdrift.report.view import build_view
from kvdrift.verdict.judge import judge
from kvdrift.vocabulary.sites import Site
from tests.support.traces import dropped, scaled, synthetic_run, touches, with_first

RUNS: dict[str, dict[str, object]] = {
    "clean": {},
    "exact": {"noise": 0.0},
    "mismatch": {"edits": [scaled(touches(Site.K_CACHE, layer=1, position=17), 1e-3)]},
    "inconclusive": {
        "edits": [
            dropped(touches(Site.ATTN_PROBS, layer=0, label="as_designed")),
            with_first(touches(Site.LOGITS, position=17, pass_name=None), math.nan),
        ],
        "rungs": ["bfloat16", "float32"],
        "rung_failures": {"float64": "NotImplementedError: no float64 kernel"},
    },
    "one_mode": {"mode": "as_designed", "command": None},
    "no_rewind": {"can_rewind": False},
}


def rendered(name: str) -> str:
    run = synthetic_run(**RUNS[name])
    return render_markdown(build_view(judge(run)))


@pytest.mark.parametrize("name", RUNS)
def test_the_report_is_the_golden_one(name: str, request: pytest.FixtureRequest) -> None:
    path = Path(__file__).parent / f"{name}.md"
    text = rendered(name)
    if request.config.getoption("--update-golden"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")


def test_every_golden_file_belongs_to_a_run() -> None:
    assert {path.stem for path in Path(__file__).parent.glob("*.md")} == set(RUNS)
