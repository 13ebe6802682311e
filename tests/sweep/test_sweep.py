"""A sweep of tiny models: what its cells end in, and that nothing finished is lost, whoever is killed."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import time
from importlib import import_module
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from benchmarks.slots import Slots
from kvdrift.report.schema import check
from kvdrift.sweep.backend import Job, JobOutcome, Limits
from kvdrift.sweep.cells import expand
from kvdrift.sweep.local import LocalBackend
from kvdrift.sweep.spec import parse_memory, read_spec
from kvdrift.sweep.store import SweepDirectory
from tests.support import jobs
from tests.support.carriers import PROMPTS, SPAN
from tests.support.command import ROOT, here, kvdrift, llama, process, refused

__all__ = ["here", "llama"]
EXAMPLES = ROOT / "examples" / "engines"
SPEC = """
[matrix]
models = [{models}]
{axes}
[prompts]
p = [5, 9, 17]
[audit]
span = 1
"""
# Models of the reader's own: a right one, one that breaks, one that stands still. `quick` is an engine of numpy: where
# nothing depends on the model, a worker need not import torch, which takes longer than its cell.
MINE = f"""
import sys, time
from pathlib import Path
def quick():
    sys.path.insert(0, {str(EXAMPLES)!r})
    from numpy_engine import make
    return make()
def good():
    from tests.support.command import SMALL
    from tests.support.tiny import tiny_model
    return tiny_model("llama", **SMALL), None
def broken():
    raise RuntimeError("no weights today")
def faulty():
    from tests.support.audits import FAULTS
    from tests.support.carriers import carrier_of
    fault = FAULTS["slot_stale"]
    model = carrier_of(fault, "float32")[1]
    global planted
    planted = fault.plant(model)  # for as long as the process lives
    planted.__enter__()
    return model, None
def hangs():
    Path("hangs").touch()
    time.sleep(120)
"""


def write_spec(folder: Path, *models: str | Path, axes: str = "", name: str = "s.toml") -> Path:
    named = ", ".join(f'"{model}"' for model in models)
    (folder / name).write_text(SPEC.format(models=named, axes=axes))
    (folder / "mine.py").write_text(MINE)
    return folder / name


def states(folder: Path) -> dict[str, str]:
    view = json.loads((folder / "summary.json").read_text())
    return {f"{Path(cell['model']).name} {cell['scenario']}": cell["state"] for cell in view["cells"]}


def until(what: Any, seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.slow
def test_every_cell_has_its_state_and_one_that_breaks_leaves_the_rest(here: Path, llama: Path) -> None:
    spec = write_spec(here, llama, "mine:broken", axes='scenarios = ["decode", "rewind"]\ncaches = ["dynamic", "f16"]')

    done = kvdrift("sweep", spec, "--out", "o", "--junit", "j.xml", "--json", "--jobs", "1")

    assert done.code == 6
    view = check("sweep", done.out)
    assert (view.verdict, view.alpha, view.alpha_of_a_cell) == ("INCOMPLETE", 1e-3, 1e-3 / 4)
    assert view.counts == {
        "PASS": 2, "FAIL": 0, "INCONCLUSIVE": 0, "ERROR": 2, "NOT_APPLICABLE": 4, "MISSING": 0,
    }  # fmt: skip
    broken = next(cell for cell in view.cells if cell.state == "ERROR")
    assert "no weights today" in broken.reasons[0]
    assert next(cell.reasons for cell in view.cells if cell.state == "NOT_APPLICABLE") == ["hf has no cache f16"]
    check("sweep", (here / "o" / "summary.json").read_text())
    page = (here / "o" / "report.html").read_text()
    for cell in view.cells:
        if cell.state == "PASS":
            report = json.loads((here / "o" / "cells" / cell.id / "report.json").read_text())
            assert report["environment"]["plan"]["alpha"] == view.alpha_of_a_cell
            assert f'href="{cell.report}"' in page
            assert (here / "o" / str(cell.report)).exists()
    suite = ET.parse(here / "j.xml").getroot().attrib
    assert (suite["tests"], suite["errors"], suite["skipped"], suite["failures"]) == ("8", "2", "4", "0")
    said = kvdrift("sweep", "status", "o")
    assert (said.code, said.err) == (0, "")
    assert said.out.startswith("sweep: 8 cells: 2 PASS, 2 ERROR, 4 NOT_APPLICABLE\nnothing runs; go on with")


@pytest.mark.slow
def test_a_planted_fault_fails_its_cell_and_the_sweep_at_its_address(here: Path) -> None:
    spec = write_spec(here, "mine:good", "mine:faulty")
    spec.write_text(
        spec.read_text().replace("[5, 9, 17]", str(list(PROMPTS["p"]))).replace("span = 1", f"span = {SPAN}")
    )

    done = kvdrift("sweep", spec, "--out", "o", "--jobs", "1", "--junit", "j.xml")

    assert done.code == 1
    assert states(here / "o") == {"mine:good decode": "PASS", "mine:faulty decode": "FAIL"}
    view = check("sweep", (here / "o" / "summary.json").read_text())
    assert view.verdict == "FAIL"
    assert view.cells[1].first_failure
    assert ET.parse(here / "j.xml").getroot().attrib["failures"] == "1"


def assert_resumed_without_what_is_finished(here: Path) -> None:
    """Mend the model that hangs, go on, and find the one finished cell as it was."""
    (kept,) = (here / "o" / "cells").glob("*/report.json")
    before = kept.stat().st_mtime_ns
    (here / "mine.py").write_text(MINE.replace("time.sleep(120)", "return quick()"))
    assert kvdrift("sweep", "--resume", "o").code == 0
    assert set(states(here / "o").values()) == {"PASS"}
    assert kept.stat().st_mtime_ns == before


@pytest.mark.slow
def test_a_hanging_cell_is_ended_and_resume_runs_it_alone(here: Path) -> None:
    spec = write_spec(here, "mine:hangs", "mine:quick")

    done = kvdrift("sweep", spec, "--out", "o", "--cell-timeout", "20", "--jobs", "1")

    assert done.code == 6
    assert states(here / "o") == {"mine:hangs decode": "ERROR", "mine:quick decode": "PASS"}
    assert "longer than 20 s (--cell-timeout)" in (here / "o" / "summary.json").read_text()
    assert all(ord(c) < 128 for c in done.out)
    assert_resumed_without_what_is_finished(here)


@pytest.mark.slow
def test_a_killed_driver_loses_nothing_finished_and_its_workers_end(here: Path) -> None:
    spec = write_spec(here, "mine:quick", "mine:hangs")
    run = process("sweep", spec, "--out", "o", "--jobs", "1", cwd=here)
    until((here / "hangs").exists)
    assert kvdrift("sweep", "status", "o").out.splitlines()[0] == "sweep: 2 cells: 1 PASS, 1 MISSING"
    refused(
        kvdrift("sweep", "--resume", "o"),
        2,
        f"a sweep is running in {here / 'o'}; see kvdrift sweep status {here / 'o'}",
    )
    workers = [int(name) for name in os.listdir("/proc") if name.isdigit() and parent(int(name)) == run.pid]
    assert workers

    run.kill()
    run.communicate(timeout=300)

    until(lambda: not any(alive(pid) for pid in workers))
    assert_resumed_without_what_is_finished(here)


def parent(pid: int) -> int | None:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return None


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
def test_a_full_disk_ends_the_sweep_with_one_line_and_what_is_finished_stays(here: Path) -> None:
    spec = write_spec(here, "mine:quick", axes="lengths = [3, '3-12']")
    spec.write_text(spec.read_text().replace("span = 1", "span = 1\ntraces = true"))
    limit = 500_000  # above every file of the short cell, below those of the long one
    run = process(
        "sweep", spec, "--out", "o", "--jobs", "1", cwd=here,
        program="import resource, sys\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))\n"
        "sys.argv[0] = 'kvdrift'\nfrom kvdrift.cli.app import main\nmain()",
    )  # fmt: skip
    out, err = run.communicate(timeout=300)

    assert (run.returncode, out) == (2, ""), err
    assert err == (
        f"kvdrift: cannot write to {here / 'o'}: no space left; 1 finished cells are kept. Make room, then go on with "
        f"kvdrift sweep --resume {here / 'o'}\n"
    )
    assert len(SweepDirectory(here / "o").results()) == 1
    assert kvdrift("sweep", "--resume", "o").code == 0


# Jobs without a model: what the backend itself does.


def run_jobs(place: Path, payloads: dict[str, dict[str, Any]], limits: Limits, **needs: Any) -> dict[str, JobOutcome]:
    listed = [
        Job(
            id=name, function=f"{jobs.__name__}:answer", payload={"place": str(place), "name": name, **payload}, **needs
        )
        for name, payload in payloads.items()
    ]
    return {outcome.id: outcome for outcome in LocalBackend().run(listed, limits, lambda job, worker: None)}


def test_a_job_whose_worker_is_killed_is_begun_again_and_at_last_given_up(tmp_path: Path) -> None:
    found = run_jobs(tmp_path, {"once": {"deaths": 1}, "always": {"deaths": 9}, "never": {}}, Limits(jobs=1, retries=1))

    assert found["once"].value is not None
    assert (found["once"].attempts, found["never"].attempts) == (2, 1)
    assert found["always"].error == "its worker ended by signal 9, 2 times"


@pytest.mark.parametrize(("memory", "together"), [(4, True), (6, False), (None, False)])
def test_two_big_jobs_do_not_run_at_once(tmp_path: Path, memory: int | None, together: bool) -> None:
    big = {name: {"seconds": 0.8} for name in ("a", "b")}

    found = run_jobs(tmp_path, big, Limits(jobs=2, memory=10), memory=memory)

    spans = sorted((item.value["began"], item.value["ended"]) for item in found.values() if item.value)
    assert (spans[1][0] < spans[0][1]) is together


def test_a_group_stays_with_its_worker(tmp_path: Path) -> None:
    found = run_jobs(tmp_path, {name: {} for name in "abc"}, Limits(jobs=2), group="one model")

    assert len({item.value["process"] for item in found.values() if item.value}) <= 2
    assert len(found) == 3


def test_a_hundred_workers_at_once_get_every_job_and_each_group_one_of_them() -> None:
    slots = Slots(0.05)
    try:
        listed = [Job(id=str(n), function="none", group=str(n // 5)) for n in range(1000)]
        found = list(LocalBackend(launch=slots.launch).run(listed, Limits(jobs=100), lambda job, worker: None))
    finally:
        slots.close()

    assert sorted(int(outcome.id) for outcome in found) == list(range(1000))
    assert slots.most_at_once == 100
    of_a_group: dict[int, set[str]] = {}
    for outcome in found:
        of_a_group.setdefault(int(outcome.id) // 5, set()).add(outcome.worker)
    assert all(len(workers) == 1 for workers in of_a_group.values())


# Specs.


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alhpa = 1", "unknown key 'alhpa'; allowed here: matrix, name, alpha, prompts, audit"),
        (
            "[matrix]\nmodels = ['m']\ndtype = ['bf16']",
            "unknown key 'matrix.dtype'; allowed here: models, engines, dtypes, attention, caches, scenarios, lengths, "
            "seeds, pairs",
        ),
        ("[matrix]\nmodels = [{name = 'm', nf = 'm'}]", "unknown key 'matrix.models.nf'; allowed here: name, hf, "),
        ("[matrix]\nmodels = 3", "Expected `array`, got `int` - at `$.matrix.models`"),
        ("alpha = 2\n[matrix]\nmodels = ['m']", "alpha is 2.0, and must lie between 0 and 1"),
        ("[matrix", "is not TOML"),
        ("[matrix]\nmodels = []", "the matrix is empty: matrix.models names no model"),
        ("[matrix]\nmodels = ['m']\nseeds = []", "the matrix is empty: matrix.seeds has no value"),
        ("[matrix]\nmodels = ['m', 'm']", "is declared twice; name each value of an axis once"),
        ("[matrix]\nmodels = ['m']\ndtypes = ['bf16', 'bfloat16']", "is declared twice"),
        (
            "[matrix]\nmodels = ['m']\ndtypes = ['bf61']",
            "matrix.dtypes has 'bf61'; allowed: bfloat16, float16, float32, ",
        ),
        ("[matrix]\nmodels = ['m']\nengines = ['vllm']", "matrix.engines has 'vllm'; allowed: hf, llamacpp, mlx"),
        ("[matrix]\nmodels = ['m']\nscenarios = ['rewnd']", "unknown scenario 'rewnd'"),
        (
            "[matrix]\nmodels = ['m']\nengines = ['mlx']",
            "the matrix is empty: no model runs in an engine that is named",
        ),
        (
            "[matrix]\nmodels = [{name = 'm', hf = 'm', memory = 'much'}]",
            "memory is 'much'; write it as 500 MB or 4 GB",
        ),
    ],
)
def test_a_wrong_spec_is_one_line_and_nothing_is_written(here: Path, text: str, message: str) -> None:
    (here / "s.toml").write_text(text)

    done = kvdrift("sweep", "s.toml", "--out", "o")

    assert (done.code, done.out) == (2, "")
    assert message in done.err
    assert done.err.count("\n") == 1
    assert not (here / "o").exists()


def test_other_wrong_calls_are_one_line(here: Path) -> None:
    spec = write_spec(here, "mine:good")
    (here / "full").mkdir()
    (here / "full" / "file").touch()

    assert kvdrift("sweep", "none.toml").err == "kvdrift: cannot read the spec none.toml: No such file or directory\n"
    assert kvdrift("sweep").code == 2
    assert kvdrift("sweep", "status").code == 2
    assert kvdrift("sweep", "status", "full").code == 5
    assert kvdrift("sweep", "--resume", "full").code == 5
    assert "is not empty" in kvdrift("sweep", spec, "--out", "full").err
    assert "File exists" in kvdrift("sweep", spec, "--out", "mine.py").err
    shutil.rmtree(here / "full")


def test_axes_that_an_engine_lacks_are_one_cell_and_pairs_need_both(here: Path) -> None:
    (here / "s.toml").write_text(
        "[matrix]\nmodels = [{name = 'm', hf = './m', llamacpp = './m.gguf'}, './n']\ndtypes = ['bf16', 'fp32']\n"
        "pairs = [['hf', 'llamacpp']]\n"
    )

    cells = expand(read_spec(here / "s.toml"))

    assert [(Path(cell.model).name, cell.engine, cell.dtype) for cell in cells] == [
        ("m", "hf", "bfloat16"),
        ("m", "hf", "float32"),
        ("m", "llamacpp", None),
        ("n", "hf", "bfloat16"),
        ("n", "hf", "float32"),
        ("m", "hf/llamacpp", None),
        ("n", "hf/llamacpp", None),
    ]
    assert (cells[5].target, cells[5].versus) == (str(here / "m"), f"llamacpp:{here / 'm.gguf'}")
    assert cells[6].why_not == f"{here / 'n'} is not declared for llamacpp"
    assert parse_memory("1.5 GB") == 1_500_000_000


def _only(required: dict[str, object], **allowed: object) -> dict[str, object]:
    """Return the schema of an object that has the properties `required`, may have those `allowed`, and no others."""
    return {
        "type": "object",
        "properties": {**required, **allowed},
        "required": [*required],
        "additionalProperties": False,
    }


def _rayjob() -> dict[str, object]:
    """The parts of a RayJob that the page uses, as the types of KubeRay's operator name and require them (v1, in
    rayjob_types.go and raycluster_types.go), and pods as Kubernetes does."""
    text, words = {"type": "string"}, {"type": "object", "additionalProperties": {"type": "string"}}
    mount = _only({"name": text, "mountPath": text})
    container = _only(
        {"name": text, "image": text},
        resources=_only({}, limits=words, requests=words),
        volumeMounts={"type": "array", "items": mount},
    )
    volume = _only({"name": text}, persistentVolumeClaim=_only({"claimName": text}))
    pod = _only(
        {"containers": {"type": "array", "items": container, "minItems": 1}}, volumes={"type": "array", "items": volume}
    )
    group: dict[str, object] = {"rayStartParams": words, "template": _only({"spec": pod})}
    count = {"type": "integer", "minimum": 0}
    workers = _only({"groupName": text, **group}, replicas=count, minReplicas=count, maxReplicas=count)
    cluster = _only({"headGroupSpec": _only(group)}, workerGroupSpecs={"type": "array", "items": workers})
    spec = _only({"entrypoint": text, "rayClusterSpec": cluster}, shutdownAfterJobFinishes={"type": "boolean"})
    return _only(
        {
            "apiVersion": {"const": "ray.io/v1"},
            "kind": {"const": "RayJob"},
            "metadata": _only({"name": text}),
            "spec": spec,
        }
    )


def test_the_job_file_of_the_documentation_is_a_rayjob() -> None:
    import yaml

    jsonschema = import_module("jsonschema")  # comes with Ray, and without types

    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    job = yaml.safe_load(page.partition("```yaml\n")[2].partition("```")[0])

    jsonschema.validate(job, _rayjob())
    cluster = job["spec"]["rayClusterSpec"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert {mount["name"] for mount in pod["containers"][0]["volumeMounts"]} <= {v["name"] for v in pod["volumes"]}
    assert job["spec"]["entrypoint"].split()[:2] == ["kvdrift", "sweep"]

    del cluster["headGroupSpec"]["rayStartParams"]
    with pytest.raises(jsonschema.ValidationError, match="'rayStartParams' is a required property"):
        jsonschema.validate(job, _rayjob())


def test_the_batch_script_of_the_documentation_is_shell_and_starts_what_the_command_line_has(tmp_path: Path) -> None:
    """Its syntax, and the words that the page hands to kvdrift by it."""
    page = (Path(__file__).resolve().parents[2] / "docs" / "cluster.md").read_text()
    script = page.partition("```text\n")[2].partition("```")[0]
    (tmp_path / "job.sh").write_text(script)

    done = subprocess.run(["bash", "-n", tmp_path / "job.sh"], capture_output=True, text=True, check=False)

    assert (done.returncode, done.stderr) == (0, "")
    submitted = page.partition("    sbatch ")[2].partition("\n")[0].partition("sweep.sh")[2]
    options = {word for word in (submitted + script.rpartition("kvdrift sweep")[2]).split() if word.startswith("--")}
    assert options == {"--out", "--backend", "--ray-address"}
    assert all(option in kvdrift("sweep", "--help").out for option in options)
