"""What a backend costs a cell: empty jobs, so that all the time is the backend's."""

from __future__ import annotations

import argparse
import importlib.util
import time
from typing import Any

from benchmarks.support import say
from kvdrift.sweep.backend import Backend, Job, Limits

N_CELLS = 10_000
LIMIT_MS = 5.0
LOCAL_WORKERS = 8


def empty(payload: dict[str, Any]) -> dict[str, Any]:
    """A cell that does nothing."""
    return payload


def run(options: argparse.Namespace) -> bool:
    """Run 10,000 empty cells on local processes and, where it is installed, on a Ray of this machine."""
    from kvdrift.sweep.local import LocalBackend

    kept = _run("local", LocalBackend(), Limits(jobs=LOCAL_WORKERS))
    if importlib.util.find_spec("ray") is None:
        say("ray: not installed, not measured")
        return kept
    from kvdrift.sweep.on_ray import RayBackend

    return _run("ray", RayBackend(), Limits()) and kept


def _run(name: str, backend: Backend, limits: Limits) -> bool:
    jobs = [Job(id=str(n), function=f"{__name__}:empty") for n in range(N_CELLS)]
    workers: set[str] = set()
    began = time.perf_counter()
    n_done = 0
    for outcome in backend.run(jobs, limits, lambda id, worker: None):
        n_done += outcome.value is not None
        workers.add(outcome.worker)
    each = (time.perf_counter() - began) / N_CELLS * 1e3
    say(f"{name}: {n_done} empty cells on {len(workers)} workers, {each:.2f} ms a cell (limit {LIMIT_MS:g} ms)")
    return n_done == N_CELLS and each < LIMIT_MS
