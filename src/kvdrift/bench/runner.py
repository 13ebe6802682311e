"""Runs the corpus: one capture for each subject, judged by kvdrift and, on the same tensors, by every peer's rule."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

from kvdrift.auditor import Progress, Silent, capture_positive_control, capture_rung
from kvdrift.bench.judging import BROKEN, judge_run, told
from kvdrift.bench.options import LadderChoice
from kvdrift.bench.peers import PeerOutcome, judge_by_peers
from kvdrift.bench.records import EDITION, LADDER, NATIVE, PeerRecord, Record, RecordFile, Step
from kvdrift.bench.subjects import BenchModel, Subject, prompt_set
from kvdrift.bench.tensors import PairedTensor, paired_tensors
from kvdrift.capture import Captured, PromptTokens, continue_greedily
from kvdrift.compare.drift import DriftTable
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.faults import Commits, Fault
from kvdrift.instruments.ladder import UPPER
from kvdrift.plan import AuditPlan, Mode
from kvdrift.prompts import tokenize
from kvdrift.run import Run
from kvdrift.trace.model import PassPair


@dataclass
class SharedTable(DriftTable):
    """A drift table that takes over the rows of a pair that `source` has compared already."""

    source: DriftTable = field(default_factory=DriftTable)

    def add(self, pair: PassPair, label: str, *, with_hashes: bool) -> None:
        """Append the rows of a pair, compared once for both tables."""
        what = (label, pair.prefill.rung, pair.prefill.prompt)
        rows = [row for row in self.source.rows if (row.mode, row.rung, row.prompt) == what]
        lost = [value for value in self.source.unpaired if (value[0], value[1], value[2].prompt) == what]
        if not rows and not lost:
            DriftTable.add(self, pair, label, with_hashes=with_hashes)
        self.rows += rows
        self.unpaired += lost


@dataclass
class WatchedRun(Run):
    """A run that keeps the native pairs of `as_designed`, and the same ones at float64, for the peers.

    `alone` is what an audit with `--ladder off` makes of the same capture, None if it is not asked for.
    """

    kept: dict[str, dict[str, PassPair]] = field(default_factory=dict)
    alone: Run | None = None

    def add(self, captured: Captured) -> None:
        """Keep what the peers look at, and compare as any run does."""
        if captured.rung in (self.info.dtype, UPPER):
            for pair in captured.pairs:
                if pair.mode is Mode.AS_DESIGNED:
                    self.kept.setdefault(captured.rung, {})[captured.prompt] = pair
        Run.add(self, captured)
        if self.alone is not None and captured.rung == self.info.dtype:
            self.alone.add(captured)

    def tensors(self) -> list[PairedTensor]:
        """Return everything that a peer can see of this run."""
        exact = self.kept.get(UPPER, {})
        return [
            tensor
            for name, pair in self.kept.get(self.info.dtype, {}).items()
            for tensor in paired_tensors(pair, exact.get(name))
        ]


@dataclass(frozen=True, slots=True)
class Bench:
    """One model at one dtype with one attention implementation, and how it is to be run."""

    loaded: BenchModel
    dtype: str
    attention: str
    ladder: LadderChoice = "both"
    plan: AuditPlan = field(default_factory=AuditPlan)
    prompts: dict[str, list[PromptTokens]] = field(default_factory=dict)

    def blank(self, subject: Subject) -> Record:
        """Return the record of a subject before it is run."""
        planted = subject.planted
        is_fault = isinstance(planted, Fault)
        return Record(
            model=self.loaded.name,
            dtype=self.dtype,
            attention=self.attention,
            prompts=subject.prompts,
            kind=subject.kind,
            name=subject.name,
            ladder=self.ladder,
            span=self.plan.span,
            edition=EDITION,
            mechanism=planted.mechanism if isinstance(planted, Fault) else None,
            cause=planted.cause if isinstance(planted, Fault) else None,
            keyed_to_dtype=isinstance(planted, Fault) and planted.keyed_to_dtype,
            amount=planted.amount if isinstance(planted, Fault) else None,
            in_all_layers=isinstance(planted, Fault) and planted.layer is None and planted.find_layer is None,
            places=subject.places(self.loaded.model) if is_fault and self._fits(subject) else [],
            skipped=subject.why_not(self.loaded.model, self.dtype),
        )

    def _fits(self, subject: Subject) -> bool:
        """Whether the model has the layer that the fault is planted in."""
        return subject.why_not(self.loaded.model, self.dtype) is None


def run_corpus(
    bench: Bench, subjects: Sequence[Subject], file: RecordFile[Record], progress: Progress | None = None
) -> Iterator[Record]:
    """Run every subject that `file` does not hold yet, add its record to the file and yield it."""
    progress = progress or Silent()
    waiting = [subjects[number] for number in waiting_for(bench, subjects, file)]
    progress.start(len(waiting))
    for subject in waiting:
        progress.step(f"{bench.dtype} {bench.attention}: {subject.name} on {subject.prompts}")
        record = measure_subject(bench, subject)
        file.add(record)
        yield record


def waiting_for(bench: Bench, subjects: Sequence[Subject], file: RecordFile[Record]) -> list[int]:
    """Return the numbers of the subjects that `file` does not hold."""
    return [number for number, subject in enumerate(subjects) if bench.blank(subject).key not in file]


def measure_subject(bench: Bench, subject: Subject) -> Record:
    """Run one subject and return its record; one that does not fit the model is a record that says why."""
    record = bench.blank(subject)
    if record.skipped is None:
        _measure(bench, subject, record)
    return record


def _measure(bench: Bench, subject: Subject, record: Record) -> None:
    """Fill in what a run of the subject shows."""
    began = time.perf_counter()
    tokens = _tokens(bench, subject.prompts)
    commits = Commits()
    try:
        with subject.plant(bench.loaded.model) as commits:
            run = _capture(bench, tokens, commits)
    except BROKEN as error:
        record.error = told(error)
    else:
        tensors = run.tensors()
        record.n_tensors = len(tensors)
        prompts = [prompt.name for prompt in run.prompts]
        record.peers = {outcome.rule: _peer(outcome) for outcome in judge_by_peers(tensors, prompts)}
        for way, judged in _ways(bench, run).items():
            record.kvdrift[way] = judge_run(judged, subject, record, bench.loaded.model)
    record.committed, record.changed = commits.count, commits.changed
    record.seconds = round(time.perf_counter() - began, 3)


def _tokens(bench: Bench, name: str) -> list[PromptTokens]:
    """The prompts of a set with the continuation that the model without a fault gives: every subject sees the same."""
    if name not in bench.prompts:
        with HFEngine(bench.loaded.model, name=bench.loaded.name) as engine:
            info = engine.info
            ids = tokenize(
                prompt_set(name, bench.loaded.encode, info.vocab_size or 2),
                bench.loaded.encode,
                vocab_size=info.vocab_size,
                max_positions=info.max_positions,
                span=bench.plan.span,
            )
            bench.prompts[name] = [
                PromptTokens(prompt, tokens, continue_greedily(engine, tokens, bench.plan.span))
                for prompt, tokens in ids.items()
            ]
    return bench.prompts[name]


def _capture(bench: Bench, tokens: Sequence[PromptTokens], commits: Commits) -> WatchedRun:
    """Capture every rung as an audit does, the positive controls included."""
    with HFEngine(bench.loaded.model, name=bench.loaded.name) as engine:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        off = replace(bench.plan, ladder="off")
        run = WatchedRun(off if bench.ladder == "off" else bench.plan, engine.info, list(tokens), created=created)
        if bench.ladder == "both":
            run.alone = Run(off, engine.info, run.prompts, created=created, table=SharedTable(source=run.table))
        for rung in run.rungs:
            capture_rung(engine, run, rung, None, Silent())
            if run.alone is not None and rung == run.alone.control_rung:
                _control_alone(engine, run.alone, commits)
    return run


def _control_alone(engine: HFEngine, alone: Run, commits: Commits) -> None:
    """Capture the positive control of `--ladder off`. An audit with the ladder has none here, so what the fault keeps
    from one pass to the next is put back to where it was."""
    memory = copy.deepcopy(commits.memory)
    with engine.at(alone.control_rung):
        capture_positive_control(engine, alone, None)
    commits.memory = memory


def _ways(bench: Bench, run: WatchedRun) -> dict[str, Run]:
    """The runs to judge, by the way in which they do."""
    if bench.ladder == "off":
        return {NATIVE: run}
    return {LADDER: run} if run.alone is None else {LADDER: run, NATIVE: run.alone}


def _peer(outcome: PeerOutcome) -> PeerRecord:
    first = None if outcome.first is None else (outcome.first.layer, str(outcome.first.site))
    if outcome.steps is None:
        return PeerRecord(flagged=False)
    return PeerRecord(flagged=outcome.flagged, first=first, steps=[_step(tensor, a) for tensor, a in outcome.steps])


def _step(tensor: PairedTensor, alarm: float) -> Step:
    return Step(tensor.layer, str(tensor.site), None if alarm == float("inf") else alarm)
