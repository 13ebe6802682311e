"""The gate on runs as continuous integration has them, beside the rules of three other tools on the same tensors.

A clean run is a tiny model on one or two threads, with a dtype, a kernel and a batch of its own: what changes between
two machines, or two jobs, without anything being wrong. A fault run is such a run with a fault of the corpus in it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import torch

from kvdrift.capture.modes import continue_greedily
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.measure.measured import Measured
from kvdrift.pipeline.audit import capture_all
from kvdrift.scenarios.catalogue import choose_scenarios
from kvdrift.scenarios.runner import Company
from kvdrift.trace.recording import RecordedPair
from kvdrift.verdict.suite import Suite
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.peers.rules import RULES, Rule, judge_by_peers
from kvdrift_bench.peers.tensors import PairedTensor
from kvdrift_bench.planted.kernels import correct_kernels
from kvdrift_bench.planted.torch import corpus_for
from kvdrift_bench.run.records import RecordFile
from kvdrift_bench.run.runner import PeerPairs

_MODELS = ("llama", "qwen3", "mistral", "gpt_neox", "phi3")
_DTYPES = ("bfloat16", "float32", "float16")
_ATTENTION = ("sdpa", "eager")
# Faults are looked for with what the gate has by default; 200 clean runs of that size would take an hour.
_SIZES = {"clean": (2, 18, 2), "fault": (3, 33, 4)}  # prompts, tokens of a prompt below, span
_EVERY_BATCH, _EVERY_KERNEL = 4, 8


def _firefly(tensor: PairedTensor) -> float:
    """The largest difference over what firefly allows where its reruns agree, which they do on such a machine."""
    return tensor.max_abs / max(1e-5, 1e-3 * float(np.abs(tensor.x).max()))


FIREFLY = Rule(
    name="firefly",
    source="neelvad/firefly, firefly-ml 0.6.0, calibrated by reruns that agree bit by bit",
    formula="max|d| > max(1e-5, 1e-3 max|x|)",
    threshold=1.0,
    statistic=_firefly,
)
PEERS = (FIREFLY, *(rule for rule in RULES if rule.name in ("sglang_rel", "torch_assert_close")))


class GateRun(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One run through the gate.

    Attributes:
        number: of the run, from which everything about it follows.
        fault: the planted fault, None for a clean run.
        kernel: the correct kernel that computes a part of the model, None for torch alone.
        batched: whether rows of a batch are audited beside plain decode.
        verdict: of kvdrift; `error` is why it broke off, which is red as well.
        first: the first failure; `right` says whether it is where the fault was planted.
        peers: whether each rule flags the run.
    """

    number: int
    fault: str | None
    model: str
    dtype: str
    attention: str
    threads: int
    kernel: str | None
    batched: bool
    verdict: str | None = None
    error: str | None = None
    first: str | None = None
    right: bool | None = None
    peers: dict[str, bool] = {}

    @property
    def key(self) -> tuple[object, ...]:
        return self.number, self.fault

    @property
    def is_red(self) -> bool:
        """Whether the gate's exit code is not 0."""
        return self.verdict not in ("EXACT", "STRUCTURAL_DRIFT")


def clean_trials(n_runs: int) -> list[GateRun]:
    """Return `n_runs` clean runs, always the same: every model, dtype, kernel and number of threads in turn."""
    return [_trial(number, None) for number in range(n_runs)]


def fault_trials(n_faults: int) -> list[GateRun]:
    """Return runs with faults of the corpus that need no scenario, spread evenly over it."""
    model: Any = lively_model("llama", torch.float32)
    faults = [f for f in corpus_for(3) if f.needs is None and f.applies(model) is None]
    wanted = min(n_faults, len(faults))
    chosen = [faults[int(at)] for at in np.linspace(0, len(faults) - 1, wanted)]
    trials = []
    for number, fault in enumerate(chosen):
        trial = _trial(number, fault.name)
        trial.model, trial.kernel, trial.batched = "llama", None, False
        if trial.dtype not in fault.dtypes:
            trial.dtype = next(dtype for dtype in _DTYPES if dtype in fault.dtypes)
        trials.append(trial)
    return trials


def _trial(number: int, fault: str | None) -> GateRun:
    # A kernel that is compiled for each shape takes minutes of compiling in such a run.
    kernels = [kernel.name for kernel in correct_kernels() if "inductor" not in kernel.name]
    return GateRun(
        number=number,
        fault=fault,
        model=_MODELS[number % len(_MODELS)],
        dtype=_DTYPES[number // len(_MODELS) % len(_DTYPES)],
        attention=_ATTENTION[number // (len(_MODELS) * len(_DTYPES)) % 2],
        threads=1 + number // 2 % 2,
        kernel=kernels[number // _EVERY_KERNEL % len(kernels)] if number % _EVERY_KERNEL == 0 else None,
        batched=number % _EVERY_BATCH == 1,  # never with a kernel: those are written for one row
    )


def run_gate(
    trials: Sequence[GateRun], file: RecordFile[GateRun], progress: Progress | None = None
) -> Iterator[GateRun]:
    """Run what `file` does not hold yet, add each run to it and yield it."""
    waiting = file.missing(trials, lambda run: run.key)
    return file.measure(waiting, measure_gate, lambda run: f"{run.fault or 'clean'} {run.number}", progress or Silent())


@dataclass(frozen=True, slots=True)
class _Planting:
    """What is planted into a model, and where a fault is to be found."""

    context: Any
    places: Sequence[tuple[int | None, Any]]


def measure_gate(run: GateRun) -> GateRun:
    """Return a run, judged by kvdrift and by the peers."""
    model: Any = lively_model(run.model, getattr(torch, run.dtype), run.attention)
    planting = _planting(run, model)
    try:
        with _threads(run.threads):
            # A fault that strikes once must not strike while tokens are chosen, which nothing records.
            with HFEngine(model, name=run.model) as engine:
                prompts = _prompts(run, engine)
            with planting.context, HFEngine(model, name=run.model) as engine:
                _judge(run, engine, planting, prompts)
    except Exception as error:  # noqa: BLE001 - a gate that breaks off is red, and the record says why
        run.error = f"{type(error).__name__}: {error}"
    return run


def _planting(run: GateRun, model: Any) -> _Planting:
    if run.fault is not None:
        fault = next(f for f in corpus_for(int(model.config.num_hidden_layers)) if f.name == run.fault)
        return _Planting(fault.plant(model), fault.places(model))
    kernel = next((kernel for kernel in correct_kernels() if kernel.name == run.kernel), None)
    if kernel is None or kernel.why_not(model, run.dtype, "both") is not None:
        run.kernel = None
        return _Planting(nullcontext(), ())
    return _Planting(kernel.plant(model, "both"), ())


def _prompts(run: GateRun, engine: HFEngine) -> list[Prompt]:
    """Random prompts with the continuations of the model as it is."""
    rng = np.random.default_rng(1000 + run.number)
    n_prompts, longest, span = _size(run)
    lengths = [int(n) for n in rng.integers(6, longest, size=n_prompts)]
    texts = [tuple(rng.integers(3, engine.info.vocab_size or 100, size=length).tolist()) for length in lengths]
    return [Prompt(f"p{i}", text, continue_greedily(engine, text, span)) for i, text in enumerate(texts)]


def _size(run: GateRun) -> tuple[int, int, int]:
    return _SIZES["clean" if run.fault is None else "fault"]


def _judge(run: GateRun, engine: HFEngine, planting: _Planting, prompts: list[Prompt]) -> None:
    plan = AuditPlan(span=_size(run)[-1])
    with_decode, others = choose_scenarios("decode,batch" if run.batched else "decode")
    company = Company(engine, others, prompts)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    suite = Suite(Measured(plan, engine.info, prompts, created=created), with_decode, company.scripts, company.passes)
    kept = _PlainPairs((engine.info.dtype, engine.info.ladder.upper))
    capture_all(engine, suite, company, kept, Silent())
    decision = suite.judge().judged.decision
    run.verdict = str(decision.verdict)
    first = decision.first_failure
    run.first = None if first is None else str(first)
    if run.fault is not None:
        run.right = first is not None and (first.layer, first.site) in planting.places
    outcomes = judge_by_peers(kept.tensors(), [prompt.name for prompt in prompts], PEERS)
    run.peers = {outcome.rule: outcome.flagged for outcome in outcomes}


class _PlainPairs(PeerPairs):
    """What the peers look at: plain decode, whatever else an audit runs."""

    def add(self, item: RecordedPair) -> None:
        """Keep a pair of plain decode."""
        if item.scenario is None:
            super().add(item)


@contextmanager
def _threads(n_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(before)
