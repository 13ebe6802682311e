"""Runs everything that was asked for: one subject after the other, or several at once in processes of their own.

Records are added to the file by this process alone.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import product
from typing import NamedTuple

from kvdrift.auditor import Progress, Silent
from kvdrift.bench.options import BenchOptions
from kvdrift.bench.records import Key, Record, RecordFile
from kvdrift.bench.runner import Bench, measure_subject, run_corpus, waiting_for
from kvdrift.bench.subjects import Subject, choose_subjects, open_model
from kvdrift.bench.tiny import attends
from kvdrift.plan import AuditPlan

Say = Callable[[str], None]


class Setting(NamedTuple):
    """A model, as `--model` names it, its native dtype, and how it attends."""

    model: str
    dtype: str
    attention: str


class Task(NamedTuple):
    """One subject of one setting, for another process: its number among those that the options choose."""

    options: BenchOptions
    setting: Setting
    number: int


def run_all(options: BenchOptions, file: RecordFile[Record], say: Say, progress: Progress | None = None) -> list[Key]:
    """Measure what `file` does not hold yet, add it there, and return the keys of everything that was asked for."""
    keys: list[Key] = []
    tasks: list[Task] = []
    for setting in (Setting(*names) for names in product(options.models, options.dtypes, options.attentions)):
        if not attends(setting.model, setting.attention):
            say(f"{setting.model} attends in eager mode only; {setting.attention} is left out")
            continue
        bench, subjects = _prepare(options, setting, say)
        keys += [bench.blank(subject).key for subject in subjects]
        if options.jobs == 1:
            _tell(run_corpus(bench, subjects, file, progress), say)
        else:
            tasks += [Task(options, setting, number) for number in waiting_for(bench, subjects, file)]
    if tasks:
        _tell(_run_in_processes(tasks, options.jobs, file, progress or Silent()), say)
    return keys


def _prepare(options: BenchOptions, setting: Setting, say: Say | None = None) -> tuple[Bench, list[Subject]]:
    loaded = open_model(setting.model, setting.dtype, setting.attention, say)
    subjects = choose_subjects(
        loaded.n_layers,
        faults=None if options.faults is None else list(options.faults),
        twins=options.twins,
        n_clean=options.n_clean,
        n_sets=options.n_sets,
    )
    plan = AuditPlan(span=options.span, keep_traces=False)
    return Bench(loaded, setting.dtype, setting.attention, options.ladder, plan), subjects


def _run_in_processes(tasks: list[Task], jobs: int, file: RecordFile[Record], progress: Progress) -> Iterator[Record]:
    progress.start(len(tasks))
    # Not forked: torch keeps threads, and a fork has none of them.
    with multiprocessing.get_context("spawn").Pool(min(jobs, len(tasks)), _become_worker) as pool:
        for record in pool.imap_unordered(_measure_task, tasks):
            progress.step(f"{record.setting}: {record.name} on {record.prompts}")
            file.add(record)
            yield record


def _become_worker() -> None:
    """One thread a process; an interrupt is for the parent, which ends its workers."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _prepared(options: BenchOptions, setting: Setting) -> tuple[Bench, list[Subject]]:
    return _prepare(options, setting)


def _measure_task(task: Task) -> Record:
    bench, subjects = _prepared(task.options, task.setting)
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
