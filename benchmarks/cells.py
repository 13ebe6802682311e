"""What a backend costs a cell: empty jobs, so that all the time is the backend's.

The first figure is a simulation: a thousand workers that are pipes, each answered by a thread a second after it got a
job (`benchmarks.slots`), and the scheduler of the local backend, which drives them. It tells what the driver computes
for a cell, and nothing of how long machines take to start or models to load.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import time
from typing import Any

from benchmarks.slots import Slots
from benchmarks.support import say
from kvdrift.sweep.backend import Backend, Job, Limits

N_CELLS = 10_000
LIMIT_MS = 5.0
LOCAL_WORKERS = 8
SIMULATED_WORKERS = 1_000
CELL_S = 1.0  # so long does a simulated cell take, or a thousand of them would never run at once
CELLS_OF_A_MODEL = 5  # cells of one group go to one worker while it is free


def empty(payload: dict[str, Any]) -> dict[str, Any]:
    """A cell that does nothing."""
    return payload


def run(options: argparse.Namespace) -> bool:
    """Run 10,000 empty cells on simulated workers, on local processes and, where it is installed, on a Ray here."""
    from kvdrift.sweep.local import LocalBackend

    kept = _simulated()
    kept = _run("local", LocalBackend(), Limits(jobs=LOCAL_WORKERS)) and kept
    if importlib.util.find_spec("ray") is None:
        say("ray: not installed, not measured")
        return kept
    from kvdrift.sweep.on_ray import RayBackend

    return _run("ray", RayBackend(), Limits()) and kept


def _simulated() -> bool:
    """Drive a thousand simulated workers; each needs four descriptors."""
    from kvdrift.sweep.local import LocalBackend

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 5 * SIMULATED_WORKERS)), hard))
    slots = Slots(CELL_S)
    try:
        backend = LocalBackend(launch=slots.launch)
        kept = _run("simulated", backend, Limits(jobs=SIMULATED_WORKERS), CELLS_OF_A_MODEL, CELL_S)
        say(f"simulated: {slots.most_at_once} cells at once")
        return kept
    finally:
        slots.close()
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _run(name: str, backend: Backend, limits: Limits, of_a_group: int = N_CELLS, seconds: float = 0.0) -> bool:
    """Run the cells. Where each takes `seconds`, what the driver computes is held against the limit."""
    jobs = [Job(id=str(n), function=f"{__name__}:empty", group=str(n // of_a_group)) for n in range(N_CELLS)]
    workers: set[str] = set()
    began, used = time.perf_counter(), time.thread_time()
    n_done = 0
    for outcome in backend.run(jobs, limits, lambda id, worker: None):
        n_done += outcome.value is not None
        workers.add(outcome.worker)
    each = (time.perf_counter() - began) / N_CELLS * 1e3
    own = (time.thread_time() - used) / N_CELLS * 1e3
    say(
        f"{name}: {n_done} empty cells on {len(workers)} workers, {each:.2f} ms a cell (limit {LIMIT_MS:g} ms), "
        f"of which the driver computes {own:.2f} ms"
    )
    return n_done == N_CELLS and (each if seconds == 0.0 else own) < LIMIT_MS
