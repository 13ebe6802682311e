"""The local backend: a few processes, no more of them at a time than memory allows."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from kvdrift.sweep.backend import Job, JobOutcome, Limits

_TICK_S = 0.2


class Launched(Protocol):
    """What the backend needs of a worker: a line of JSON in for each job, one out for its answer, and an end."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None
    pid: int

    @property
    def returncode(self) -> int | Any:
        """As of `subprocess.Popen`."""
        ...

    def kill(self) -> None:
        """End it."""
        ...

    def wait(self) -> int:
        """Return its exit code once it has ended."""
        ...


@dataclass(slots=True)
class _Worker:
    """A process, the job that it computes, and the group whose model it may still hold."""

    process: Launched
    name: str
    job: Job | None = None
    began: float = 0.0
    held: Job | None = None
    buffer: bytes = b""


class LocalBackend:
    """Runs jobs in processes of this machine. A worker keeps what its function keeps, such as a loaded model.

    Args:
        log: file to which workers' stderr is appended; None drops it.
        launch: starts a worker, given that log.
    """

    def __init__(self, log: Path | None = None, launch: Callable[[Path | None], Launched] | None = None) -> None:
        self._log, self._launch = log, launch or launch_process

    def run(self, jobs: Sequence[Job], limits: Limits, started: Callable[[str, str], None]) -> Iterator[JobOutcome]:
        """Yield an outcome for every job. A job that needs more than there is runs alone, and is not refused."""
        run = _LocalRun(list(jobs), limits, started, lambda: self._launch(self._log))
        try:
            while run.groups or run.busy:
                run.fill()
                yield from run.wait()
        finally:
            run.stop()


class _LocalRun:
    """The state of one run: what waits, and who computes."""

    def __init__(
        self, jobs: list[Job], limits: Limits, started: Callable[[str, str], None], launch: Callable[[], Launched]
    ) -> None:
        # What waits, by group, in the order of the first job of each: a choice must not go through all that waits, or
        # ten thousand cells on a thousand workers cost seconds each.
        self.groups: dict[str, deque[Job]] = {}
        for job in jobs:
            self.groups.setdefault(job.group, deque()).append(job)
        self.busy: dict[str, _Worker] = {}
        self._idle: dict[str, _Worker] = {}
        self._most = limits.jobs or os.cpu_count() or 1
        self._memory = limits.memory or free_memory()
        self._limits = limits
        self._started = started
        self._launch = launch
        self._attempts: dict[str, int] = {}
        self._count = 0
        self._selector = selectors.DefaultSelector()

    def fill(self) -> None:
        """Give jobs to workers while there are free ones and memory."""
        while self.groups and len(self.busy) < self._most:
            choice = self._choose()
            if choice is None:
                return
            group, worker = choice
            self._give(self._take(group), worker or self._start())

    def _take(self, group: str) -> Job:
        waiting = self.groups[group]
        job = waiting.popleft()
        if not waiting:
            del self.groups[group]
        return job

    def _choose(self) -> tuple[str, _Worker | None] | None:
        """Return the group of the next job and an idle worker that holds it; None if nothing fits at this moment."""
        for worker in self._idle.values():
            if worker.held is not None and worker.held.group in self.groups:
                return worker.held.group, worker
        taken = {worker.job.group for worker in self.busy.values() if worker.job is not None}
        fresh = next((group for group in self.groups if group not in taken), next(iter(self.groups)))
        if self.busy and not self._fits(self.groups[fresh][0]):
            return None
        for worker in list(self._idle.values()):  # what it holds is of no use to what waits, and its memory may be
            self._end(worker)
        return fresh, None

    def _fits(self, job: Job) -> bool:
        """Whether a job fits beside those that run; what is unknown runs alone."""
        beside = [worker.job.memory for worker in self.busy.values() if worker.job is not None]
        if job.memory is None or None in beside:
            return False
        return job.memory + sum(size or 0 for size in beside) <= self._memory

    def _start(self) -> _Worker:
        self._count += 1
        process = self._launch()
        worker = _Worker(process, f"worker {self._count}")
        assert process.stdout is not None
        self._selector.register(process.stdout, selectors.EVENT_READ, worker)
        self._idle[worker.name] = worker
        return worker

    def _give(self, job: Job, worker: _Worker) -> None:
        self._attempts[job.id] = self._attempts.get(job.id, 0) + 1
        worker.job = worker.held = job
        self.busy[worker.name] = self._idle.pop(worker.name)
        worker.began = time.monotonic()
        self._started(job.id, f"{worker.name}, process {worker.process.pid}")
        line = json.dumps({"id": job.id, "function": job.function, "payload": job.payload}) + "\n"
        assert worker.process.stdin is not None
        with suppress(BrokenPipeError):  # it died while idle: `wait` sees it
            worker.process.stdin.write(line.encode())
            worker.process.stdin.flush()

    def wait(self) -> Iterator[JobOutcome]:
        """Yield what ended: answers, workers that died, jobs that took too long."""
        for key, _ in self._selector.select(_TICK_S):
            worker: _Worker = key.data
            chunk = os.read(key.fd, 1 << 16)
            if not chunk:
                yield from self._died(worker)
                continue
            *lines, worker.buffer = (worker.buffer + chunk).split(b"\n")
            for line in lines:
                yield self._answer(worker, json.loads(line))
        limit = self._limits.timeout
        if limit is None:
            return
        for worker in list(self.busy.values()):
            if worker.job is not None and time.monotonic() - worker.began > limit:
                job = worker.job
                self._end(worker)
                yield self._outcome(
                    job, worker, error=f"it took longer than {limit:g} s (--cell-timeout) and was ended"
                )

    def _answer(self, worker: _Worker, answer: dict[str, object]) -> JobOutcome:
        job, worker.job = worker.job, None
        self._idle[worker.name] = self.busy.pop(worker.name)
        assert job is not None
        value, error = answer.get("value"), answer.get("error")
        assert value is None or isinstance(value, dict)
        return self._outcome(job, worker, value=value, error=None if error is None else str(error))

    def _died(self, worker: _Worker) -> Iterator[JobOutcome]:
        job = worker.job
        self._end(worker)
        if job is None:
            return
        if self._attempts[job.id] <= self._limits.retries:
            first = {job.group: self.groups.get(job.group, deque())}
            first[job.group].appendleft(job)
            self.groups = {**first, **self.groups}
            return
        code = worker.process.returncode
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        yield self._outcome(job, worker, error=f"its worker ended {how}, {self._attempts[job.id]} times")

    def _outcome(
        self, job: Job, worker: _Worker, value: dict[str, object] | None = None, error: str | None = None
    ) -> JobOutcome:
        return JobOutcome(
            id=job.id,
            value=value,
            error=error,
            seconds=time.monotonic() - worker.began,
            attempts=self._attempts[job.id],
            worker=worker.name,
        )

    def _end(self, worker: _Worker) -> None:
        self.busy.pop(worker.name, None)
        self._idle.pop(worker.name, None)
        assert worker.process.stdout is not None
        assert worker.process.stdin is not None
        self._selector.unregister(worker.process.stdout)
        worker.process.kill()
        worker.process.wait()
        worker.process.stdout.close()
        with suppress(BrokenPipeError):
            worker.process.stdin.close()
        worker.job = None

    def stop(self) -> None:
        """End all workers."""
        for worker in [*self.busy.values(), *self._idle.values()]:
            self._end(worker)
        self._selector.close()


def launch_process(log: Path | None) -> Launched:
    """Start a worker as a process of this machine."""
    with nullcontext(subprocess.DEVNULL) if log is None else log.open("ab") as errors:
        return subprocess.Popen(
            [sys.executable, "-m", "kvdrift.sweep.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=errors,
            # It finds the modules that the driver finds.
            env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
            start_new_session=True,  # an interrupt is the driver's affair
        )


def free_memory() -> int:
    """Return the bytes that the system could give to new processes; 8 GB where it does not say."""
    with suppress(OSError, StopIteration, ValueError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
    return 8_000_000_000
