"""Runs everything that was asked for: one subject after the other, or several at once in processes of their own.

Records are added to the file by this process alone.
"""

from __future__ import annotations

import multiprocessing
import signal
import tempfile
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift_bench.run.options import BenchOptions, Setting
from kvdrift_bench.run.records import Key, Record, RecordFile
from kvdrift_bench.run.runner import Bench, measure_subject, run_corpus
from kvdrift_bench.run.subjects import Host, Subject, choose_subjects

Say = Callable[[str], None]


class Task(NamedTuple):
    """One subject of one setting, for another process: its number among those that the options choose. `folder` is for
    what all processes write and read."""

    options: BenchOptions
    setting: Setting
    folder: Path
    number: int


def run_all(options: BenchOptions, file: RecordFile[Record], say: Say, progress: Progress | None = None) -> list[Key]:
    """Measure what `file` does not hold yet, add it there, and return the keys of everything that was asked for."""
    with tempfile.TemporaryDirectory(prefix="kvdrift-bench-") as folder:
        return _run_all(options, file, Path(folder), say, progress)


def _run_all(
    options: BenchOptions, file: RecordFile[Record], folder: Path, say: Say, progress: Progress | None
) -> list[Key]:
    keys: list[Key] = []
    tasks: list[Task] = []
    for setting in options.settings:
        if (why := _why_left_out(setting)) is not None:
            say(f"{why}; {setting.attention} is left out")
            continue
        bench, subjects = _prepare(options, setting, folder, say)
        keys += [bench.blank(subject).key for subject in subjects]
        if options.jobs == 1:
            _tell(run_corpus(bench, subjects, file, progress), say)
        else:
            numbers = {bench.blank(subject).key: number for number, subject in enumerate(subjects)}
            tasks += [Task(options, setting, folder, numbers[key]) for key in file.missing(numbers, tuple)]
    if tasks:
        _tell(_run_in_processes(tasks, options.jobs, file, progress or Silent()), say)
    return keys


def _why_left_out(setting: Setting) -> str | None:
    """Why a combination of the options does not exist, None if it does."""
    if setting.engine == "llamacpp":
        from kvdrift_bench.run.llamacpp_host import why_not_run

        return why_not_run(setting.kv_type, setting.attention)
    from kvdrift_bench.models.tiny import attends

    return None if attends(setting.model, setting.attention) else f"{setting.model} attends in eager mode only"


def _open(setting: Setting, folder: Path, say: Say | None = None) -> Host:
    if setting.engine == "llamacpp":
        from kvdrift_bench.run.llamacpp_host import open_llamacpp

        return open_llamacpp(setting.model, setting.kv_type, setting.attention, folder, weights=setting.dtype)
    from kvdrift_bench.run.torch_host import open_torch

    return open_torch(setting.model, setting.dtype, setting.attention, say)


def _prepare(
    options: BenchOptions, setting: Setting, folder: Path, say: Say | None = None
) -> tuple[Bench, list[Subject]]:
    host = _open(setting, folder, say)
    subjects = choose_subjects(
        host, faults=options.faults, twins=options.twins, n_clean=options.n_clean, n_sets=options.n_sets
    )
    return Bench(host, options.ladder, AuditPlan(span=options.span, keep_traces=False)), subjects


def _run_in_processes(tasks: list[Task], jobs: int, file: RecordFile[Record], progress: Progress) -> Iterator[Record]:
    progress.start(len(tasks))
    # Not forked: torch keeps threads, and a fork has none of them.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(tasks)), _become_worker) as pool:
        for record in pool.imap_unordered(_measure_task, tasks):
            progress.step(f"{record.setting}: {record.name} on {record.prompts}")
            file.add(record)
            yield record


def _become_worker() -> None:
    """One thread a process; an interrupt is for the parent, which ends its workers. llama.cpp has one in any case."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if find_spec("torch") is not None:
        import torch

        torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _prepared(options: BenchOptions, setting: Setting, folder: Path) -> tuple[Bench, list[Subject]]:
    return _prepare(options, setting, folder)


def _measure_task(task: Task) -> Record:
    bench, subjects = _prepared(task.options, task.setting, task.folder)
    return measure_subject(bench, subjects[task.number])


def _tell(records: Iterator[Record], say: Say) -> None:
    for record in records:
        if record.skipped is None:
            say(_line(record))


def _line(record: Record) -> str:
    said = ", ".join(
        f"{way} {judged.verdict}" + (f" at {judged.address}" if judged.address else "")
        for way, judged in record.kvdrift.items()
    )
    name = record.name if record.kind != "clean" else record.prompts
    others = f" on {record.prompts}" if record.kind == "fault" and record.prompts != "set_0" else ""
    return f"{record.setting}: {record.kind} {name}{others}: {record.error or said} ({record.seconds:.1f} s)"
