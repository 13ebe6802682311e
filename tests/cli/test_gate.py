"""The gate, the comparison of runs, JSON on stdout and the pytest plugin: a mismatch is red, and so is not knowing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from kvdrift.pairing.drift import DriftTable
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.diff import diff_runs
from kvdrift.report.ci import github_annotation, github_summary, junit
from kvdrift.report.lines import ten_lines
from tests.support.audits import audited
from tests.support.command import MAIN, ROOT, SMALL, kvdrift, refused, save, write_prompts
from tests.support.tiny import tiny_model

pytestmark = pytest.mark.xdist_group("slot_stale")


@pytest.fixture(scope="module")
def stale() -> Audit:
    return audited("slot_stale").audit


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one tiny model: three prompts and a span of four are twelve units."""
    folder = tmp_path_factory.mktemp("runs")
    model = save(tiny_model("llama", dtype=torch.float32, **SMALL), folder / "llama")
    prompts = write_prompts(folder / "p.jsonl", {"a": range(3, 9), "b": range(20, 31), "c": range(50, 66)})
    for name in ("one", "two"):
        arguments = ("audit", model, "--prompts", prompts, "--no-traces", "--out", folder / name, "--json")
        done = kvdrift(*arguments)
        assert done.code == 0
        assert json.loads(done.out)["verdict"] in ("EXACT", "STRUCTURAL_DRIFT")
        assert json.loads(done.out) == json.loads((folder / name / "report.json").read_text())
    return folder


def changed(run: Path, folder: Path, drift: float = 1.0, **values: object) -> Path:
    """A copy of a run whose drift at one place is `drift` times as large, and whose report has other values."""
    folder.mkdir()
    view = json.loads((run / "report.json").read_text())
    view.update(values)
    (folder / "report.json").write_text(json.dumps(view))
    rows = [
        row._replace(rel_l2=row.rel_l2 * drift) if (row.layer, str(row.site)) == (1, "mlp_out") else row
        for row in DriftTable.read(run / "drift.parquet")
    ]
    DriftTable.of(rows).write(folder)
    return folder


def test_json_is_all_that_is_printed(runs: Path) -> None:
    shown = kvdrift("show", runs / "one", "--json")

    assert json.loads(shown.out) == json.loads((runs / "one" / "report.json").read_text())
    assert {row["name"] for row in json.loads(kvdrift("scenarios", "--json").out)} > {"decode", "rewind"}


def test_a_run_is_no_worse_than_itself_made_again(runs: Path) -> None:
    done = kvdrift("diff", runs / "one", runs / "two")

    assert done.code == 0
    assert "no worse" in done.out
    assert "12 (prompt, position) units" in done.out


def test_drift_that_grew_at_one_place_is_worse_there_and_shrinking_is_better(runs: Path, tmp_path: Path) -> None:
    worse = changed(runs / "one", tmp_path / "worse", drift=1.5)

    found = diff_runs(runs / "one", worse)
    back = diff_runs(worse, runs / "one")

    assert found.exit_code == 1
    assert {text.split(":")[0].partition(" / ")[2] for text in found.worse} == {"layer 1 / mlp_out"}
    assert back.exit_code == 0
    assert len(back.better) == len(found.worse)


def test_runs_of_other_weights_are_compared_by_verdict_alone(runs: Path, tmp_path: Path) -> None:
    view = json.loads((runs / "one" / "report.json").read_text())
    view["environment"]["model_hash"] = "0" * 64
    other = changed(runs / "one", tmp_path / "other", drift=1.5, environment=view["environment"])

    found = diff_runs(runs / "one", other)

    assert found.worse == ()
    assert found.facts[0].startswith("model_hash")
    assert found.why_not is not None


@pytest.mark.parametrize(("verdict", "code"), [("MISMATCH", 1), ("INCONCLUSIVE", 6), ("EXACT", 0)])
def test_the_gate_is_green_for_a_pass_alone(runs: Path, tmp_path: Path, verdict: str, code: int) -> None:
    run = changed(runs / "one", tmp_path / "run", verdict=verdict)

    done = kvdrift("gate", run, "--junit", tmp_path / "out.xml")

    suite = ET.parse(tmp_path / "out.xml").getroot()
    assert done.code == code
    assert (suite.get("failures"), suite.get("errors")) == (str(int(code == 1)), str(int(code == 6)))
    assert len(done.out.splitlines()) <= 10


def test_a_pass_that_is_worse_than_its_baseline_is_red(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worse = changed(runs / "one", tmp_path / "worse", drift=1.5)
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))

    done = kvdrift("gate", worse, "--baseline", runs / "one", "--github-summary")

    assert done.code == 1
    assert "layer 1 / mlp_out: drift 1.5 times as large" in done.out
    assert "::error title=kvdrift: worse than the baseline::" in done.out
    assert "worse than the baseline" in (tmp_path / "summary.md").read_text()
    assert kvdrift("gate", runs / "two", "--baseline", runs / "one").code == 0


def test_what_cannot_be_read_is_one_line(runs: Path, tmp_path: Path) -> None:
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "report.json").write_text('{"schema_version": 1, "verd')
    newer = changed(runs / "one", tmp_path / "newer", schema_version=99)

    assert kvdrift("gate", tmp_path / "half").code == 5
    assert "schema version 99" in kvdrift("gate", newer).err
    refused(
        kvdrift("gate", runs / "one", "--baseline", tmp_path / "no"), 5, f"there is no run directory {tmp_path / 'no'}"
    )


@pytest.mark.parametrize(
    "text", ['{"schema_version": 1, "verd', '{"schema_version": 99, "verdict": "EXACT"}', "[]", ""]
)
@pytest.mark.parametrize(
    "verb", [("gate", "bad"), ("gate", "one", "--baseline", "bad"), ("diff", "bad", "one"), ("diff", "one", "bad")]
)
def test_a_run_that_is_damaged_or_newer_is_one_line_wherever_it_stands(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, verb: tuple[str, ...]
) -> None:
    (tmp_path / "one").symlink_to(runs / "one")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "report.json").write_text(text)
    monkeypatch.chdir(tmp_path)

    for options in ((), ("--json",)):
        done = kvdrift(*verb, *options)
        assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)
        assert "bad/report.json" in done.err
        assert ("update kvdrift" in done.err) is ("99" in text)


def test_a_baseline_of_another_model_is_named_and_compared_by_its_verdict(runs: Path, tmp_path: Path) -> None:
    view = json.loads((runs / "one" / "report.json").read_text())
    view["environment"]["model_hash"] = "0" * 64
    other = changed(runs / "one", tmp_path / "other", drift=0.1, environment=view["environment"])
    worse = changed(runs / "one", tmp_path / "worse", environment=view["environment"], verdict="MISMATCH")

    done = kvdrift("gate", runs / "one", "--baseline", other)

    assert done.code == 0
    assert done.out.splitlines()[-1].startswith(
        f"baseline {other}: drift was not compared place by place: model_hash 0000000000000000... and "
    )
    assert kvdrift("gate", worse, "--baseline", runs / "one").code == 1


def test_runs_of_unlike_kinds_are_not_compared(runs: Path, tmp_path: Path) -> None:
    server = changed(runs / "one", tmp_path / "server", kind="server")
    two = changed(runs / "one", tmp_path / "two", report="compare-engines")

    for a, b, said in (
        (runs / "one", server, "is an audit of a model and {b} an audit of a server"),
        (two, server, "is a comparison of two engines and {b} an audit of a server"),
    ):
        refused(kvdrift("diff", a, b), 5, f"{a} {said.format(b=b)}; compare two runs of one kind")


def test_a_failure_is_ten_lines_with_address_and_cause(stale: Audit) -> None:
    lines = ten_lines(stale.view, Path("run"))

    assert len(lines) <= 10
    assert lines[0].startswith("MISMATCH (semantic)")
    assert any("layer 2 / k_cache" in line for line in lines)
    assert any("slot_stale" in line for line in lines)


def test_texts_for_ci_escape_what_would_break_them(stale: Audit) -> None:
    view = {**stale.view, "model": "a\x00]]><b>```\n::error::x"}

    assert ET.fromstring(junit(view).partition("\n")[2]).get("failures") == "1"
    assert github_summary(view).count("```") == 2
    annotation = github_annotation(view)
    assert annotation is not None
    assert "\n" not in annotation


@pytest.mark.parametrize(("verdict", "code"), [("STRUCTURAL_DRIFT", 0), ("MISMATCH", 1)])
def test_the_step_of_the_action_hands_on_what_it_found(runs: Path, tmp_path: Path, verdict: str, code: int) -> None:
    run = changed(
        runs / "one", tmp_path / "run", verdict=verdict, first_failure={"text": "p / pos 3 / layer 1 / mlp_out"}
    )
    (tmp_path / "bin").mkdir()
    program = f'#!/bin/sh\nexec {sys.executable} -c "{MAIN}" "$@"\n'
    (tmp_path / "bin" / "kvdrift").write_text(program)
    (tmp_path / "bin" / "kvdrift").chmod(0o755)
    environment = {
        "PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin",
        "PYTHONPATH": str(ROOT / "src"),
        "KVDRIFT_TARGET": str(run),
        "GITHUB_OUTPUT": str(tmp_path / "output"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }

    done = subprocess.run(["sh", ROOT / "tools" / "ci" / "gate.sh"], cwd=tmp_path, env=environment, check=False)

    assert done.returncode == code
    assert (tmp_path / "output").read_text().splitlines() == [
        f"verdict={verdict}",
        "first-failure=p / pos 3 / layer 1 / mlp_out",
        f"report={run}/report.html",
    ]
    assert (tmp_path / "kvdrift.xml").is_file()
    assert verdict in (tmp_path / "summary").read_text()


PLUGIN_TEST = """
import pytest, torch
import kvdrift
from tests.support.audits import FAULTS
from tests.support.carriers import PROMPTS, carrier_of
from tests.support.tiny import tiny_model

OPTIONS = dict(prompts={"p": PROMPTS["p"]}, span=1)

def clean():
    return tiny_model("llama", dtype=torch.float32)

def test_clean(kvdrift_audit):
    assert kvdrift_audit(clean(), **OPTIONS).exit_code == 0

def test_fault(kvdrift_audit):
    fault = FAULTS["slot_stale"]
    model = carrier_of(fault, "float32")[1]
    with fault.plant(model):
        kvdrift_audit(model, **OPTIONS)

def test_not_told(kvdrift_audit):
    kvdrift_audit(clean(), ladder="off", **OPTIONS)

def test_nothing_measured(kvdrift_audit):
    pass

def test_assertion():
    with pytest.raises(AssertionError, match="INCONCLUSIVE"):
        kvdrift.assert_no_kv_mismatch(clean(), ladder="off", **OPTIONS)
"""

CUT = "==== the next run ===="


def test_the_plugin_fails_what_does_not_pass(tmp_path: Path) -> None:
    (tmp_path / "test_model.py").write_text(PLUGIN_TEST)
    common = ["-p", "kvdrift.cli.pytest_plugin", "-p", "no:cacheprovider", "-rA", "-q", "-p", "no:randomly"]
    common += ["-p", "no:xdist", str(tmp_path / "test_model.py"), "--rootdir", str(tmp_path)]
    runs: dict[str, list[str]] = {"fail": [], "warn": ["--kvdrift-inconclusive=warn", "-k", "not_told or assertion"]}
    # One process for both: most of the time goes into importing torch.
    code = (
        f"import pytest\nfor options in {list(runs.values())}:\n    pytest.main({common} + options)\n    print({CUT!r})"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{ROOT / 'src'}:{ROOT}", "PATH": "/usr/bin:/bin", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        check=False,
    ).stdout
    done = dict(zip(runs, ran.split(CUT), strict=False))

    out = done["fail"]
    for name, outcome in {
        "test_clean": "PASSED",
        "test_fault": "FAILED",
        "test_not_told": "FAILED",
        "test_nothing_measured": "ERROR",
        "test_assertion": "PASSED",
    }.items():
        assert any(line.startswith(outcome) and f"::{name}" in line for line in out.splitlines()), (name, out)
    assert "first failure: p / pos" in out
    assert "cause: slot_stale" in out
    assert "nothing was audited" in out
    assert "2 passed, 3 deselected" in done["warn"]
    assert "InconclusiveWarning" in done["warn"]


def test_the_plugin_costs_next_to_nothing_where_it_is_not_used() -> None:
    code = "import sys, pytest; old = {*sys.modules}; import kvdrift.cli.pytest_plugin; print(*{*sys.modules} - old)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT / "src")}, check=True
    )

    assert not {"numpy", "torch", "jinja2", "kvdrift.pipeline.audit"} & set(done.stdout.split())
