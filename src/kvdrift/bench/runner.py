"""Runs the corpus: one capture for each subject, judged by kvdrift and, on the same tensors, by every peer's rule."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from kvdrift.auditor import Progress, Silent, capture_rung
from kvdrift.bench.peers import PeerOutcome, judge_by_peers
from kvdrift.bench.records import LADDER, NATIVE, Judged, PeerRecord, Place, Record, RecordFile, Step
from kvdrift.bench.subjects import BenchModel, Subject, prompt_set
from kvdrift.bench.tensors import PairedTensor, paired_tensors
from kvdrift.capture import Captured, PromptTokens, continue_greedily
from kvdrift.compare.drift import NO_LAYER, DriftTable
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.errors import KvdriftError
from kvdrift.faults import Commits, Fault
from kvdrift.instruments.ladder import LOWER, UPPER
from kvdrift.plan import AuditPlan, Mode
from kvdrift.prompts import tokenize
from kvdrift.run import Run
from kvdrift.sites import Site, forward_rank
from kvdrift.trace.model import PassPair
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.model import Verdict

LadderChoice = Literal["model", "off", "both"]
LADDER_CHOICES: tuple[LadderChoice, ...] = ("model", "off", "both")
# What a model with a fault in it may raise; a fault that breaks the run has not been found by kvdrift.
_BROKEN = (RuntimeError, ValueError, TypeError, IndexError, KeyError, ArithmeticError, KvdriftError)
_PACKAGE = "kvdrift"


@dataclass
class WatchedRun(Run):
    """A run that keeps the native pairs of `as_designed`, and the same ones at float64, for the peers."""

    kept: dict[str, dict[str, PassPair]] = field(default_factory=dict)

    def add(self, captured: Captured) -> None:
        """Keep what the peers look at, and compare as any run does."""
        if captured.rung in (self.info.dtype, UPPER):
            for pair in captured.pairs:
                if pair.mode is Mode.AS_DESIGNED:
                    self.kept.setdefault(captured.rung, {})[captured.prompt] = pair
        Run.add(self, captured)

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
            mechanism=planted.mechanism if isinstance(planted, Fault) else None,
            cause=planted.cause if isinstance(planted, Fault) else None,
            keyed_to_dtype=isinstance(planted, Fault) and planted.keyed_to_dtype,
            amount=planted.amount if isinstance(planted, Fault) else None,
            places=subject.places(self.loaded.model) if is_fault and self._fits(subject) else [],
            skipped=subject.why_not(self.loaded.model, self.dtype),
        )

    def _fits(self, subject: Subject) -> bool:
        """Whether the model has the layer that the fault is planted in."""
        return subject.why_not(self.loaded.model, self.dtype) is None


def run_corpus(
    bench: Bench, subjects: Sequence[Subject], file: RecordFile, progress: Progress | None = None
) -> Iterator[Record]:
    """Run every subject that `file` does not hold yet, add its record to the file and yield it."""
    progress = progress or Silent()
    blanks = [(subject, bench.blank(subject)) for subject in subjects]
    waiting = [(subject, record) for subject, record in blanks if record.key not in file]
    progress.start(len(waiting))
    for subject, record in waiting:
        progress.step(f"{record.setting}: {record.name} on {record.prompts}")
        if record.skipped is None:
            _measure(bench, subject, record)
        file.add(record)
        yield record


def _measure(bench: Bench, subject: Subject, record: Record) -> None:
    """Fill in what a run of the subject shows."""
    began = time.perf_counter()
    tokens = _tokens(bench, subject.prompts)
    commits = Commits()
    try:
        with subject.plant(bench.loaded.model) as commits:
            run = _capture(bench, tokens)
    except _BROKEN as error:
        record.error = _told(error)
    else:
        tensors = run.tensors()
        record.n_tensors = len(tensors)
        prompts = [prompt.name for prompt in run.prompts]
        record.peers = {outcome.rule: _peer(outcome) for outcome in judge_by_peers(tensors, prompts)}
        if bench.ladder != "off":
            record.kvdrift[LADDER] = _judge(run, bench, subject, record, with_ladder=True)
        if bench.ladder != "model":
            record.kvdrift[NATIVE] = _judge(run, bench, subject, record, with_ladder=False)
    record.committed, record.changed = commits.count, commits.changed
    record.seconds = round(time.perf_counter() - began, 3)


def _told(error: BaseException) -> str:
    """An exception as one line, with the place in kvdrift that it passed last."""
    cause = error.__cause__ or error
    line = next(iter(str(cause).strip().splitlines()), "")
    frames = [frame for frame in traceback.extract_tb(cause.__traceback__) if _PACKAGE in Path(frame.filename).parts]
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{type(cause).__name__}: {line}{where}"


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


def _capture(bench: Bench, tokens: Sequence[PromptTokens]) -> WatchedRun:
    """Capture every rung as an audit does, the positive control included."""
    with HFEngine(bench.loaded.model, name=bench.loaded.name) as engine:
        created = datetime.now(UTC).isoformat(timespec="seconds")
        run = WatchedRun(bench.plan, engine.info, list(tokens), created=created)
        rungs = [engine.info.dtype] if bench.ladder == "off" else [engine.info.dtype, LOWER, UPPER]
        for rung in dict.fromkeys(rungs):
            capture_rung(engine, run, rung, None, Silent())
    return run


def _judge(run: WatchedRun, bench: Bench, subject: Subject, record: Record, *, with_ladder: bool) -> Judged:
    seen: Run = run if with_ladder else _native_part(run)
    decision = seen.decide()
    verdict = decision.verdict if with_ladder else _verdict_at_native(decision)
    judged = Judged(verdict=str(verdict), kind=decision.kind, reasons=list(decision.reasons))
    first = decision.first_failure if verdict is Verdict.MISMATCH else None
    if first is not None:
        judged.address, judged.place = str(first), (first.layer, str(first.site))
        judged.cause = _diagnose(seen, decision, record)
    _state_directed(judged, decision)
    if not isinstance(subject.planted, Fault):
        return judged
    if first is not None:
        judged.right_address = subject.planted.is_at(first, bench.loaded.model)
        judged.right_layer = judged.right_address or _same_layer(judged.place, record.places)
        judged.right_cause = None if judged.cause is None else subject.planted.is_cause(judged.cause)
    _state_effect(judged, run, decision, record.places, with_ladder=with_ladder)
    return judged


def _state_directed(judged: Judged, decision: Decision) -> None:
    """Note what the directed tests say, in the sharpest mode in which they could judge."""
    for native in decision.natives.values():
        found = next((item for item in native.evidence if item.instrument == "directed" and item.valid), None)
        if found is not None:
            judged.p_value = found.p_value
            judged.minimum = dict(found.detail["minimum_by_cause"])  # type: ignore[call-overload]
            judged.estimates = {cause.cause: cause.size for cause in native.causes}


def _diagnose(run: Run, decision: Decision, record: Record) -> str | None:
    """The cause that a diagnosis names. One that breaks off is noted and leaves the verdict as it is."""
    try:
        explained = run.diagnose(decision)
    except _BROKEN as error:
        record.error = f"the diagnosis: {_told(error)}"
        return "unexplained"
    return None if explained is None else explained.diagnosis.cause


def _native_part(run: WatchedRun) -> Run:
    """The run as it would be without the upper rungs of the ladder."""
    native = run.info.dtype
    table = DriftTable(
        [row for row in run.table.rows if row.rung == native],
        [value for value in run.table.unpaired if value[1] == native],
    )
    return replace(run, table=table, plant=None, control_mode=None, rung_failures={})


def _verdict_at_native(decision: Decision) -> Verdict:
    """The conclusion of the native instruments alone: what only the ladder or the control could tell does not count."""
    if any(native.first is not None for native in decision.natives.values()):
        return Verdict.MISMATCH
    if all(outcome.n_pairs and outcome.n_exact == outcome.n_pairs for outcome in decision.outcomes if outcome.verdict):
        return Verdict.EXACT
    valid = any(native.is_valid for native in decision.natives.values())
    return Verdict.STRUCTURAL_DRIFT if valid else Verdict.INCONCLUSIVE


def _same_layer(place: Place | None, places: Sequence[Place]) -> bool:
    """Whether a place is in the layer of one of `places`; before and after the layers are two places, not one."""
    if place is None:
        return False
    return any(_layer_of(place) == _layer_of(true) for true in places)


def _layer_of(place: Place) -> int:
    return forward_rank(place[0], Site(place[1]))[0]


def _state_effect(
    judged: Judged, run: WatchedRun, decision: Decision, places: Sequence[Place], *, with_ladder: bool
) -> None:
    """Note how large the fault is where it enters, and whether the audit claims to see one of that size.

    At float64 the drift at the true place is the effect of the fault alone. At the native dtype it holds rounding too,
    which the stated minimum has to cover.
    """
    native = run.info.dtype
    at_native = _drift(run.table, native, places), _stated(decision, "native")
    known = [at_native]
    if with_ladder:
        known.insert(0, (_drift(run.table, UPPER, places), _stated(decision, "ladder")))
    claims = [(effect, least) for effect, least in known if effect is not None and least is not None]
    if not claims:
        judged.effect = next((effect for effect, _ in known if effect is not None), None)
        return
    judged.effect, judged.detectable = next((claim for claim in claims if claim[0] > claim[1]), claims[0])
    judged.above = judged.effect > judged.detectable


def _drift(table: DriftTable, rung: str, places: Sequence[Place]) -> float | None:
    """The largest relative drift at one of `places`, with aligned inputs where there are any."""
    wanted = {(NO_LAYER if layer is None else layer, site) for layer, site in places}
    for mode in (Mode.KV_ALIGNED, Mode.AS_DESIGNED):
        found = [row.rel_l2 for key, row in table.select(str(mode), rung).items() if key[2:] in wanted]
        if found:
            return min(max(found), sys.float_info.max)
    return None


def _stated(decision: Decision, instrument: str) -> float | None:
    """The largest of the smallest effects that an instrument says it can see."""
    stated = [
        item.minimum_detectable
        for item in decision.evidence
        if item.instrument == instrument and item.valid and item.minimum_detectable is not None
    ]
    return max(stated, default=None)


def _peer(outcome: PeerOutcome) -> PeerRecord:
    first = None if outcome.first is None else (outcome.first.layer, str(outcome.first.site))
    if outcome.steps is None:
        return PeerRecord(flagged=False)
    return PeerRecord(flagged=outcome.flagged, first=first, steps=[_step(tensor, a) for tensor, a in outcome.steps])


def _step(tensor: PairedTensor, alarm: float) -> Step:
    return Step(tensor.layer, str(tensor.site), None if alarm == float("inf") else alarm)
