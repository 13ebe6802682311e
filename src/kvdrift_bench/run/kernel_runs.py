"""Audits models of which a correct kernel computes a part by other means, and models with a fault in such a kernel."""

from __future__ import annotations

import logging
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import msgspec
import numpy as np
import torch

import kvdrift
from kvdrift.engines.hf.load import load_model
from kvdrift.errors import UsageError
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift_bench.catalogue import Passes
from kvdrift_bench.models.carriers import one_thread
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.kernels import correct_kernels, faults_of_kernels
from kvdrift_bench.planted.kernels.registry import Kernel, KernelFault
from kvdrift_bench.planted.torch import Commits
from kvdrift_bench.run.options import EMBEDDED, TINY
from kvdrift_bench.run.records import RecordFile

Kind = Literal["kernel", "fault", "draw"]
Ladder = Literal["model", "off"]

NOTHING = "none"  # a draw of a model with no kernel in it
_PASSES: tuple[Passes, ...] = ("decode", "both")
_SEED = 20_000  # of the first draw
_GRID_LENGTHS, _GRID_SPAN = (14, 18, 23), 3
_POSITIONS = 4096  # so that a tiny model takes prompts of thousands of tokens
_DRAWN_MODELS = ("tiny:llama", "tiny:qwen3", "tiny:gemma3", "tiny:mistral")


class KernelRun(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """One audit.

    Attributes:
        kind: "kernel" for a correct kernel in the grid, "draw" for a drawn one, "fault" for a fault of a kernel.
        name: of what is planted, "none" where nothing is.
        ladder: "model" or "off".
        lengths, seed: of the prompts, which are random tokens.
        committed, changed: how often the kernel ran, and how often that changed a tensor.
        reasons: why an audit is INCONCLUSIVE.
        right: whether the first failure is where the fault was planted; None for what is not a fault.
        error: why the audit broke off, None if it did not.
    """

    kind: Kind
    name: str
    model: str
    dtype: str
    passes: Passes
    ladder: Ladder
    lengths: tuple[int, ...]
    seed: int
    span: int
    committed: int = 0
    changed: int = 0
    verdict: str | None = None
    mismatch: str | None = None
    address: str | None = None
    cause: str | None = None
    reasons: list[str] = []
    right: bool | None = None
    right_cause: bool | None = None
    error: str | None = None
    seconds: float = 0.0

    @property
    def key(self) -> tuple[object, ...]:
        return (
            *(self.kind, self.name, self.model, self.dtype, self.passes, self.ladder),
            *(self.lengths, self.seed, self.span),
        )


@dataclass(frozen=True, slots=True)
class KernelTrial:
    """What is audited, before it is; `planted` is None for a model with nothing in it."""

    run: KernelRun
    planted: Kernel | KernelFault | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What the runs of a grid are: every kernel, or those named, in every combination of these."""

    models: Sequence[str]
    dtypes: Sequence[str]
    ladders: Sequence[Ladder]
    names: Sequence[str] | None = None
    faults: bool = True
    skipped: dict[str, str] = field(default_factory=dict)

    def trials(self) -> list[KernelTrial]:
        """Return the trials; those that a model cannot carry, or that are not correct in it, are left out.

        Raises:
            UsageError: there is no such kernel or fault, or no such model.
        """
        kernels = {kernel.name: kernel for kernel in correct_kernels()}
        known = {*kernels, *(fault.name for fault in faults_of_kernels(1))}
        if unknown := [name for name in self.names or () if name not in known]:
            raise UsageError(f"there is no kernel {unknown[0]!r}; known: {', '.join(sorted(known))}")
        found: list[KernelTrial] = []
        for spec in self.models:
            model = _model(spec, "float32") if spec != EMBEDDED else _model(spec, "bfloat16")
            faults = faults_of_kernels(int(model.config.num_hidden_layers)) if self.faults else ()
            planted: list[Kernel | KernelFault] = [*kernels.values(), *faults]
            for each in planted:
                if self.names is None or each.name in self.names:
                    found += self._of(each, spec, model)
        return found

    def _of(self, planted: Kernel | KernelFault, spec: str, model: Any) -> Iterator[KernelTrial]:
        kernel = planted if isinstance(planted, Kernel) else None
        for dtype in self.dtypes:
            for passes in _PASSES if kernel else _PASSES[:1]:
                why = kernel.why_not(model, dtype, passes) if kernel else planted.applies(model)
                if why is not None:
                    continue
                for ladder in self.ladders:
                    run = KernelRun(
                        kind="kernel" if kernel else "fault",
                        name=planted.name,
                        model=spec,
                        dtype=dtype,
                        passes=passes,
                        ladder=ladder,
                        lengths=_GRID_LENGTHS,
                        seed=0,
                        span=_GRID_SPAN,
                    )
                    yield KernelTrial(run, planted)


def draw_trials(n_draws: int, dtypes: Sequence[str], ladders: Sequence[Ladder]) -> list[KernelTrial]:
    """Return `n_draws` clean audits of kernels, dtypes, models, prompts and spans drawn at random, always the same.

    Of a hundred six have a span of 32, six a prompt of 500 tokens, two one of 2,000, and two are of the embedded model.
    The others have one to four prompts of 5 to 40 tokens and a span of 1 to 8. In one of a dozen nothing is planted.
    """
    kernels: dict[str, Kernel | None] = {kernel.name: kernel for kernel in correct_kernels()}
    return [_draw(number, kernels, dtypes, ladders) for number in range(n_draws)]


def _draw(
    number: int, kernels: dict[str, Kernel | None], dtypes: Sequence[str], ladders: Sequence[Ladder]
) -> KernelTrial:
    rng = np.random.default_rng(_SEED + number)
    share = number % 100
    spec = EMBEDDED if share in (49, 99) else str(rng.choice(_DRAWN_MODELS))
    span = 32 if share in (5, 20, 35, 55, 70, 85) else int(rng.integers(1, 8, endpoint=True))
    lengths = tuple(int(n) for n in rng.integers(5, 40, size=int(rng.integers(1, 4, endpoint=True)), endpoint=True))
    if share in (10, 25, 40, 60, 75, 90):
        lengths, span = (500,), min(span, 4)
    if share in (30, 80):
        lengths, span = (2000,), min(span, 4)
    if spec == EMBEDDED:
        span = min(span, 4)
    dtype = "bfloat16" if spec == EMBEDDED else str(rng.choice(list(dtypes)))
    ladder = ladders[int(rng.integers(len(ladders)))]
    names = [*kernels, NOTHING, NOTHING, NOTHING, NOTHING]
    while True:
        name, passes = str(rng.choice(names)), _PASSES[int(rng.integers(2))]
        kernel = kernels.get(name)
        if kernel is None or kernel.why_not(_model(spec, dtype), dtype, passes) is None:
            break
    run = KernelRun(
        kind="draw",
        name=name,
        model=spec,
        dtype=dtype,
        passes=passes,
        ladder=ladder,
        lengths=lengths,
        seed=_SEED + number,
        span=span,
    )
    return KernelTrial(run, kernel)


@cache
def _model(spec: str, dtype: str) -> Any:
    """Return the model that `spec` names; one for all who ask.

    Raises:
        UsageError: there is no such model.
    """
    if spec == EMBEDDED:
        return load_model(None, dtype=dtype, attention="sdpa").model
    if not spec.startswith(TINY):
        raise UsageError(f"{spec!r} is no model of this benchmark; use --model {EMBEDDED} or tiny:llama (models=...)")
    return lively_model(spec.removeprefix(TINY), getattr(torch, dtype), max_position_embeddings=_POSITIONS)


def run_kernels(
    trials: Sequence[KernelTrial], file: RecordFile[KernelRun], progress: Progress | None = None
) -> Iterator[KernelRun]:
    """Audit what `file` does not hold yet, add each run to it and yield it."""
    waiting = file.missing(trials, lambda trial: trial.run.key)
    return file.measure(
        waiting, measure, lambda trial: f"{trial.run.model} {trial.run.dtype}: {trial.run.name}", progress or Silent()
    )


@contextmanager
def _quietly() -> Iterator[None]:
    """Keep what TorchInductor warns of, once for each process, off the progress."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)


def measure(trial: KernelTrial) -> KernelRun:
    """Return the run of a trial, audited."""
    run, planted, commits = trial.run, trial.planted, Commits()
    began = time.perf_counter()
    model = _model(run.model, run.dtype)
    planting: Any = nullcontext(commits)
    if isinstance(planted, Kernel):
        planting = planted.plant(model, run.passes)
    elif planted is not None:
        planting = planted.plant(model)
    try:
        with one_thread(), _quietly(), planting as commits:
            audit = kvdrift.audit(model, prompts=prompts_of(run, model), span=run.span, ladder=run.ladder)
    except Exception as error:  # noqa: BLE001 - whatever an audit raises, the record says that it was not judged
        run.error = traceback.format_exception_only(error)[-1].strip()
    else:
        run.verdict, run.mismatch = str(audit.verdict), None if audit.kind is None else str(audit.kind)
        run.reasons = list(audit.view["reasons"])
        run.cause = None if audit.diagnosis is None else str(audit.diagnosis.cause)
        run.address = None if audit.first_failure is None else str(audit.first_failure)
        if isinstance(planted, KernelFault) and audit.first_failure is not None:
            run.right = (audit.first_failure.layer, audit.first_failure.site) in planted.places(model)
            run.right_cause = None if run.cause is None else planted.is_cause(run.cause)
    run.committed, run.changed = commits.count, commits.changed
    run.seconds = round(time.perf_counter() - began, 2)
    return run


def prompts_of(run: KernelRun, model: Any) -> dict[str, list[int]]:
    """Return the prompts of a run: random tokens, always the same ones."""
    rng = np.random.default_rng(run.seed)
    vocabulary = int(model.config.vocab_size)
    return {f"p{i}": rng.integers(3, vocabulary, size=length).tolist() for i, length in enumerate(run.lengths)}
