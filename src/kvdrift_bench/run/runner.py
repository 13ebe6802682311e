"""Runs the corpus: one capture for each subject, judged by kvdrift and, on the same tensors, by every peer's rule."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import msgspec

from kvdrift.capture.control import capture_control
from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import tokenize
from kvdrift.capture.rungs import DecodeCapture
from kvdrift.engines.base import LiveEngine
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Block
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import Fan, PairSink, RecordedPair
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan, Mode, PairRole
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift_bench.models.prompt_sets import prompt_set
from kvdrift_bench.peers.rules import PeerOutcome, judge_by_peers
from kvdrift_bench.peers.tensors import PairedTensor, paired_tensors
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.run.judging import BROKEN, judge_run, told
from kvdrift_bench.run.options import LadderChoice
from kvdrift_bench.run.records import EDITION, LADDER, NATIVE, PeerRecord, Record, RecordFile, Step
from kvdrift_bench.run.subjects import Host, Subject


@dataclass
class SharedTable(DriftTable):
    """A drift table that takes over the rows of a pair that `source` has compared already."""

    source: DriftTable = field(default_factory=DriftTable)

    def add(self, pair: PassPair, label: str, *, with_hashes: bool) -> Block:
        """Append the block of a pair, compared once for both tables, and return it."""
        what = (label, pair.prefill.rung, pair.prefill.prompt)
        blocks = [block for block in self.source.blocks if (block.mode, block.rung, block.prompt) == what]
        if not blocks:
            return DriftTable.add(self, pair, label, with_hashes=with_hashes)
        self.blocks += blocks
        self.unpaired += [value for value in self.source.unpaired if (value[0], value[1], value[2].prompt) == what]
        return blocks[-1]


@dataclass
class PeerPairs:
    """Keeps the native pairs of `as_designed`, and the same ones at the fine rung, for the peers."""

    rungs: tuple[str, str]  # native, fine
    pairs: dict[str, dict[str, PassPair]] = field(default_factory=dict)

    def add(self, item: RecordedPair) -> None:
        """Keep what the peers look at."""
        pair, rung = item.pair, item.pair.prefill.rung
        if item.role is PairRole.PAIR and pair.mode is Mode.AS_DESIGNED and rung in self.rungs:
            self.pairs.setdefault(rung, {})[pair.prefill.prompt] = pair

    def release(self) -> None:
        """Do nothing: what is kept is wanted at the end."""

    def tensors(self) -> list[PairedTensor]:
        """Return everything that a peer can see of this run."""
        native, fine = self.rungs
        exact = self.pairs.get(fine, {})
        return [
            tensor
            for name, pair in self.pairs.get(native, {}).items()
            for tensor in paired_tensors(pair, exact.get(name))
        ]


@dataclass(frozen=True)
class Alone:
    """Takes what an audit with `--ladder off` sees of a capture with the ladder."""

    measured: Measured

    def add(self, item: RecordedPair) -> None:
        """Take in a pair at the native dtype; the control of the ladder is none of it."""
        if item.role is not PairRole.CONTROL and item.pair.prefill.rung == self.measured.info.dtype:
            self.measured.add(item)

    def release(self) -> None:
        """Do nothing: no trace was kept."""


@dataclass(frozen=True)
class Captured:
    """One capture: what the peers see, and what was measured by each way to judge."""

    kept: PeerPairs
    ways: dict[str, Measured]
    prompts: list[str]


@dataclass(frozen=True, slots=True)
class Bench:
    """One model as an engine runs it, and how it is to be audited."""

    host: Host
    ladder: LadderChoice = "both"
    plan: AuditPlan = field(default_factory=AuditPlan)
    prompts: dict[str, list[Prompt]] = field(default_factory=dict)

    def blank(self, subject: Subject) -> Record:
        """Return the record of a subject before it is run."""
        fault = subject.fault
        skipped = None if subject.planted is None else self.host.why_not(subject.planted)
        return Record(
            model=self.host.name,
            dtype=self.host.dtype,
            attention=self.host.attention,
            prompts=subject.prompts,
            kind=subject.kind,
            name=subject.name,
            ladder=self.ladder,
            span=self.plan.span,
            edition=EDITION,
            mechanism=None if fault is None else fault.mechanism,
            cause=None if fault is None else fault.cause,
            keyed_to_dtype=fault is not None and fault.keyed_to_dtype,
            amount=None if fault is None else fault.amount,
            in_all_layers=fault is not None and fault.in_all_layers,
            places=self.host.places(fault) if fault is not None and skipped is None else [],
            skipped=skipped,
        )


def run_corpus(
    bench: Bench, subjects: Sequence[Subject], file: RecordFile[Record], progress: Progress | None = None
) -> Iterator[Record]:
    """Run every subject that `file` does not hold yet, add its record to the file and yield it."""
    return file.measure(
        file.missing(subjects, lambda subject: bench.blank(subject).key),
        lambda subject: measure_subject(bench, subject),
        lambda subject: f"{bench.host.dtype} {bench.host.attention}: {subject.name} on {subject.prompts}",
        progress or Silent(),
    )


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
    commits = Tally()
    try:
        with bench.host.run(subject.planted) as (engine, commits):
            trial = _capture(bench, engine, tokens, commits)
    except BROKEN as error:
        record.error = told(error)
    else:
        tensors = trial.kept.tensors()
        record.n_tensors = len(tensors)
        record.peers = {outcome.rule: _peer(outcome) for outcome in judge_by_peers(tensors, trial.prompts)}
        for way, measured in trial.ways.items():
            record.kvdrift[way] = judge_run(measured, subject, record)
    record.committed, record.changed = commits.count, commits.changed
    record.seconds = round(time.perf_counter() - began, 3)


def _tokens(bench: Bench, name: str) -> list[Prompt]:
    """The prompts of a set with the continuation that the model without a fault gives: every subject sees the same."""
    if name not in bench.prompts:
        with bench.host.run(None) as (engine, _):
            info, encode = engine.info, bench.host.encoder(engine)
            ids = tokenize(
                prompt_set(name, encode, info.vocab_size or 2),
                encode,
                vocab_size=info.vocab_size,
                max_positions=info.max_positions,
                span=bench.plan.span,
            )
            bench.prompts[name] = [
                Prompt(prompt, tokens, continue_greedily(engine, tokens, bench.plan.span))
                for prompt, tokens in ids.items()
            ]
    return bench.prompts[name]


def _capture(bench: Bench, engine: LiveEngine, tokens: Sequence[Prompt], commits: Tally) -> Captured:
    """Capture every rung as an audit does, the positive controls included."""
    created = datetime.now(UTC).isoformat(timespec="seconds")
    off = msgspec.structs.replace(bench.plan, ladder="off")
    measured = Measured(off if bench.ladder == "off" else bench.plan, engine.info, list(tokens), created=created)
    kept = PeerPairs((engine.info.dtype, engine.info.ladder.upper))
    ways = {NATIVE if bench.ladder == "off" else LADDER: measured}
    sinks: list[PairSink] = [kept, measured]
    if bench.ladder == "both":
        table = SharedTable(source=measured.table)
        ways[NATIVE] = Measured(off, engine.info, measured.prompts, created=created, table=table)
        sinks.append(Alone(ways[NATIVE]))
    capture = DecodeCapture(engine, measured, Fan(sinks))
    for rung in measured.rungs:
        capture.run(rung, Silent())
        if bench.ladder == "both" and rung == ways[NATIVE].control_rung:
            _control_alone(engine, ways[NATIVE], commits)
    return Captured(kept, ways, [prompt.name for prompt in tokens])


def _control_alone(engine: LiveEngine, alone: Measured, commits: Tally) -> None:
    """Capture the positive controls of `--ladder off`. An audit with the ladder has none here, so what the fault keeps
    from one pass to the next is put back to where it was."""
    memory = copy.deepcopy(commits.memory)
    with engine.at(alone.control_rung):
        for control in capture_control(engine, alone):
            alone.add(control)
    commits.memory = memory


def _peer(outcome: PeerOutcome) -> PeerRecord:
    first = None if outcome.first is None else (outcome.first.layer, str(outcome.first.site))
    if outcome.steps is None:
        return PeerRecord(flagged=False)
    return PeerRecord(flagged=outcome.flagged, first=first, steps=[_step(tensor, a) for tensor, a in outcome.steps])


def _step(tensor: PairedTensor, alarm: float) -> Step:
    return Step(tensor.layer, str(tensor.site), None if alarm == float("inf") else alarm)
