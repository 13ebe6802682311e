"""The Ray backend: Ray schedules, places and retries, and keeps CPUs, GPUs and memory for what runs."""

from __future__ import annotations

import importlib
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from kvdrift.errors import EngineUnavailable, UsageError
from kvdrift.sweep.backend import Job, JobOutcome, Limits, call

_TICK_S = 0.2
_CONNECT_S = 5.0
# Jobs that Ray has been given beyond those that can run: enough for no worker to wait for the driver.
_AHEAD = 4
# Seconds that a job may wait for a node which is large enough, while nothing else runs.
_WAIT_FOR_NODE_S = 60.0


class RayBackend:
    """Runs jobs as tasks of Ray. A worker process of Ray keeps what a job's function keeps, such as a loaded model.

    Args:
        address: of a cluster, as `ray.init` takes it; None for RAY_ADDRESS or, without it, a Ray of this machine.

    Raises:
        EngineUnavailable: Ray is not installed, or nothing answers at the address.
    """

    def __init__(self, address: str | None = None) -> None:
        try:
            self._ray: Any = importlib.import_module("ray")
        except ModuleNotFoundError as error:
            raise EngineUnavailable("--backend ray needs 'ray'; pip install 'kvdrift[ray]'") from error
        _require_reachable(address)
        # What Ray tells of nodes and workers it prints to stdout whatever it was told, in the middle of a result; the
        # outcomes of jobs say it.
        printing: Any = importlib.import_module("ray._private.worker")
        if hasattr(printing, "_worker_logs_enabled"):
            printing._worker_logs_enabled = False
        if self._ray.is_initialized():
            return
        try:
            self._ray.init(
                address=address,
                log_to_driver=False,
                logging_level="error",
                include_dashboard=None if address else False,
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            said = next(iter(str(error).splitlines()), "")
            raise EngineUnavailable(f"cannot reach Ray at {address or 'this machine'}: {said}") from error

    def run(self, jobs: Sequence[Job], limits: Limits, started: Callable[[str, str], None]) -> Iterator[JobOutcome]:
        """Yield an outcome for every job. A job that is larger than every node is given up after a minute."""
        if limits.memory is not None:
            raise UsageError("--memory is for --backend local; in Ray a node says how much it has")
        run = _RayRun(self._ray, list(jobs), limits, started)
        try:
            while run.pending or run.running:
                run.fill()
                yield from run.wait()
        finally:
            run.stop()


def _require_reachable(address: str | None) -> None:
    """Try the port of an address that names one: Ray itself waits for minutes."""
    host, colon, port = (address or "").removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise EngineUnavailable(
            f"cannot reach Ray at {address}: {error.strerror or error}; check --ray-address, or start it: "
            "ray start --head"
        ) from error


def _work(function: str, payload: dict[str, Any], board: Any, name: str, paths: list[str]) -> dict[str, Any]:
    """Run in a worker of Ray: say where, then do the job. An exception is its outcome, and no reason to try again."""
    sys.path += [path for path in paths if path not in sys.path]
    where = f"{socket.gethostname()}, process {os.getpid()}"
    board.started.remote(name, where)
    began = time.monotonic()
    try:
        value, error = call(function, payload), None
    except Exception as failure:  # noqa: BLE001  # one cell's failure is that cell's outcome
        value, error = None, f"{type(failure).__name__}: {next(iter(str(failure).splitlines()), '')}"
    return {"value": value, "error": error, "where": where, "seconds": time.monotonic() - began}


class _Board:
    """An actor that hears which jobs began, and on which worker."""

    def __init__(self) -> None:
        self._begun: list[tuple[str, str]] = []

    def started(self, name: str, worker: str) -> None:
        self._begun.append((name, worker))

    def take(self) -> list[tuple[str, str]]:
        begun, self._begun = self._begun, []
        return begun


class _RayRun:
    """The state of one run."""

    def __init__(self, ray: Any, jobs: list[Job], limits: Limits, started: Callable[[str, str], None]) -> None:
        self.pending = sorted(jobs, key=lambda job: job.group)  # jobs of a model one after the other
        self.pending.reverse()
        self.running: dict[Any, Job] = {}
        self._ray = ray
        self._limits = limits
        self._started = started
        self._began: dict[str, float] = {}
        self._heard: set[str] = set()
        self._attempts: dict[str, int] = {}
        self._last_sign = time.monotonic()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=True
        )
        self._board = ray.remote(_Board).options(num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._task = ray.remote(_work)

    def fill(self) -> None:
        """Give Ray more than it can run at once."""
        cpus = int(self._ray.cluster_resources().get("CPU", 1)) if self.pending else 1
        most = self._limits.jobs or max(16, _AHEAD * cpus)
        while self.pending and len(self.running) < most:
            job = self.pending.pop()
            options: dict[str, Any] = {
                "num_cpus": job.cpus,
                "num_gpus": job.gpus,
                "max_retries": self._limits.retries,
                "name": job.id,
            }
            if job.memory:
                options["memory"] = job.memory
            ref = self._task.options(**options).remote(job.function, job.payload, self._board, job.id, sys.path[:])
            self.running[ref] = job

    def wait(self) -> Iterator[JobOutcome]:
        """Yield what ended."""
        ready, _ = self._ray.wait(list(self.running), num_returns=1, timeout=_TICK_S)
        if ready:
            more, _ = self._ray.wait(list(self.running), num_returns=len(self.running), timeout=0)
            ready = list(dict.fromkeys([*ready, *more]))
        self._hear()
        for ref in ready:
            yield self._outcome(ref, self.running.pop(ref))
        yield from self._too_long()

    def _hear(self) -> None:
        try:
            begun = self._ray.get(self._board.take.remote())
        except (
            self._ray.exceptions.RayActorError
        ):  # its node died: Ray starts it elsewhere; what it forgot is told when the job ends
            return
        for name, worker in begun:
            self._began[name] = self._last_sign = time.monotonic()
            self._attempts[name] = self._attempts.get(name, 0) + 1
            self._heard.add(name)
            self._started(name, worker)

    def _outcome(self, ref: Any, job: Job) -> JobOutcome:
        self._last_sign = time.monotonic()
        attempts = max(1, self._attempts.get(job.id, 1))
        seconds = self._last_sign - self._began.pop(job.id, self._last_sign)
        try:
            done = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            said = next(iter(str(error).splitlines()), "")
            text = f"its worker ended, {attempts} times: {type(error).__name__}: {said}"
            self._tell_late(job, "unknown worker")
            return JobOutcome(id=job.id, value=None, error=text, seconds=seconds, attempts=attempts)
        self._tell_late(job, done["where"])
        return JobOutcome(
            id=job.id,
            value=done["value"],
            error=done["error"],
            seconds=done["seconds"],
            attempts=attempts,
            worker=done["where"],
        )

    def _tell_late(self, job: Job, worker: str) -> None:
        """Say that a job began whose sign got lost: each is told of once at least."""
        if job.id not in self._heard:
            self._heard.add(job.id)
            self._started(job.id, worker)

    def _too_long(self) -> Iterator[JobOutcome]:
        now, limit = time.monotonic(), self._limits.timeout
        for ref, job in list(self.running.items()):
            began = self._began.get(job.id)
            if limit is not None and began is not None and now - began > limit:
                text = f"it took longer than {limit:g} s (--cell-timeout) and was ended"
            elif began is None and not self._began and now - self._last_sign > _WAIT_FOR_NODE_S:
                text = f"no node has {job.cpus:g} CPUs, {job.gpus:g} GPUs and {(job.memory or 0) / 1e9:.1f} GB for it"
            else:
                continue
            self._ray.cancel(ref, force=True)
            del self.running[ref]
            yield JobOutcome(id=job.id, value=None, error=text, seconds=now - self._began.pop(job.id, now))

    def stop(self) -> None:
        """Cancel what runs."""
        for ref in self.running:
            self._ray.cancel(ref, force=True)
        self._ray.kill(self._board)


__all__ = ["RayBackend"]
