"""The Ray backend on a real cluster of two nodes, one of which is killed in the middle."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from kvdrift.errors import EngineUnavailable
from kvdrift.report.schema import check
from kvdrift.sweep.backend import Job, Limits
from kvdrift.sweep.on_ray import RayBackend
from tests.support import jobs
from tests.support.bucket import bucket, keys
from tests.support.command import here, kvdrift, refused
from tests.sweep.test_places import ENGINES

__all__ = ["bucket", "here"]
# Ray leaves sockets and files to its processes; a warning in one of its threads is not a fault of ours.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ray"), pytest.mark.filterwarnings("ignore")]


def job(name: str, seconds: float = 0.0, function: str = "nap", **needs: Any) -> Job:
    return Job(id=name, function=f"{jobs.__name__}:{function}", payload={"seconds": seconds}, **needs)


@pytest.fixture
def cluster(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A cluster of one node, which the driver is on, and no dashboard. Its nodes know where the bucket is."""
    import ray
    from ray.cluster_utils import Cluster

    # A cluster has kvdrift installed; this one finds what this process finds, in whatever folder its nodes run.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    ray.init(address=made.address, log_to_driver=False, logging_level="error")
    try:
        yield made
    finally:
        ray.shutdown()
        made.shutdown()
        ray._private.worker._worker_logs_enabled = True


@pytest.mark.matrix  # a further backend: what becomes of jobs whose worker dies is in test_sweep.py
def test_a_killed_node_loses_no_job_and_a_sweep_runs_on_the_rest(
    cluster: Any, bucket: Any, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ray._private.worker import print_worker_logs

    second = cluster.add_node(num_cpus=1)
    said = {"ip": "127.0.0.1", "pid": "raylet", "is_err": False, "lines": ["a node died"], "job": None}
    print_worker_logs(said, sys.stdout)
    assert "a node died" in capsys.readouterr().out
    backend = RayBackend()
    print_worker_logs(said, sys.stdout)  # which Ray does by itself, in the middle of a result
    assert capsys.readouterr().out == ""
    begun: list[str] = []

    def started(name: str, worker: str) -> None:
        begun.append(name)
        if len(begun) == 3:  # both nodes have a job: the next ones of the second must go elsewhere
            cluster.remove_node(second, allow_graceful=False)

    found = list(backend.run([job(f"job {n}", 0.3) for n in range(10)], Limits(retries=3), started))

    assert len(begun) > 3
    assert set(begun) == {f"job {n}" for n in range(10)}
    assert sorted(item.id for item in found) == sorted(f"job {n}" for n in range(10))
    assert [item.error for item in found if item.value is None] == []

    def error_of(task: Job, timeout: float) -> str | None:
        (found,) = backend.run([task], Limits(timeout=timeout), lambda name, worker: None)
        return found.error

    # What breaks may take as long as a busy machine needs to start a worker.
    assert error_of(job("breaks", function="fail"), 300) == "ValueError: broken on purpose"
    assert error_of(job("hangs", 600), 4) == "it took longer than 4 s (--cell-timeout) and was ended"

    (here / "mine.py").write_text(ENGINES)
    monkeypatch.syspath_prepend(here)  # nodes look for modules where the driver does
    (here / "s.toml").write_text(
        "[matrix]\nmodels = ['mine:quick']\nlengths = [3, 5]\n[prompts]\np = [5, 9, 17]\n[audit]\nspan = 1\n"
    )
    done = kvdrift("sweep", "s.toml", "--out", "o", "--backend", "ray")
    assert (done.code, "PASS: 2 PASS" in done.out) == (0, True), done.err

    # The same into a bucket: workers write there, and what one of them wrote is not done again.
    done = kvdrift("sweep", "s.toml", "--out", "s3://sweeps/o", "--backend", "ray", "--json")
    cells = check("sweep", done.out).cells
    assert [cell.state for cell in cells] == ["PASS", "PASS"], done.err
    kept = keys(bucket)
    assert {f"o/{cell.report}" for cell in cells} < set(kept)
    # Times in a bucket are whole seconds: old enough, they show what is written again.
    first, second_cell = (f"o/results/{cell.id}.json" for cell in cells)
    while datetime.now(UTC) - max(kept[first], kept[second_cell]) < timedelta(seconds=2):
        sleep(0.1)
    bucket.delete_object(Bucket="sweeps", Key=second_cell)
    again = kvdrift("sweep", "--resume", "s3://sweeps/o", "--backend", "ray")
    assert (again.code, "PASS: 2 PASS" in again.out) == (0, True), again.err
    now = keys(bucket)
    assert (now[first] == kept[first], now[second_cell] > kept[second_cell]) == (True, True)


def test_a_cluster_out_of_reach_is_one_line(here: Path) -> None:
    (here / "s.toml").write_text("[matrix]\nmodels = ['default']\n")

    done = kvdrift("sweep", "s.toml", "--out", "o", "--backend", "ray", "--ray-address", "127.0.0.1:9")

    assert (done.code, done.out) == (3, "")
    assert done.err == (
        "kvdrift: cannot reach Ray at 127.0.0.1:9: Connection refused; check --ray-address, or start it: "
        "ray start --head\n"
    )
    assert not (here / "o").exists()


def test_without_ray_it_is_one_line(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    real = importlib.import_module

    def without(name: str, package: str | None = None) -> Any:
        if name == "ray":
            raise ModuleNotFoundError("No module named 'ray'", name="ray")
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)

    with pytest.raises(EngineUnavailable, match=r"--backend ray needs 'ray'; pip install 'kvdrift\[ray\]'"):
        RayBackend()
    refused(
        kvdrift("sweep", "s.toml", "--backend", "slurm"), 2, "unknown backend 'slurm'; --backend takes local or ray"
    )
