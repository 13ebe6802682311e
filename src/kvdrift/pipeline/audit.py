"""The audit: captures every prompt at every rung, judges, and leaves a run directory. Only composes."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvdrift.capture.modes import capture_control, capture_prompt, continue_greedily
from kvdrift.capture.prompts import Encode, default_prompts, prompts_of_lengths, tokenize
from kvdrift.capture.scenarios import capture_scenarios
from kvdrift.compare.drift import DriftTable
from kvdrift.engines.base import Engine
from kvdrift.errors import CaptureError, KvdriftError, UsageError
from kvdrift.instruments.control import SITES, native_places, planted_size, size_at_native
from kvdrift.instruments.ladder import climb
from kvdrift.instruments.native import fresh_rows
from kvdrift.measure.measured import Run, alone, rungs_of
from kvdrift.pipeline.saved import describe_suite
from kvdrift.report.markdown import render_markdown
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.scenarios import build_suite_view
from kvdrift.report.view import to_strict_json
from kvdrift.scenarios.catalogue import choose_scenarios
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.runner import Company
from kvdrift.trace.model import PassPair
from kvdrift.trace.store import TraceStore
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.suite import Suite
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Evidence, Kind, Verdict
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import (
    CONTROL,
    SPECIFICATION,
    AuditPlan,
    LadderChoice,
    Mode,
    ModeChoice,
    Prompts,
    sort_lengths,
)
from kvdrift.vocabulary.progress import Progress, Silent

# Places that are tried for the positive control of the native instruments, until one is judged by them.
_CONTROLS = 4


@dataclass(frozen=True, slots=True)
class Audit:
    """The result of an audit. `path` is the run directory, None if none was written."""

    decision: Decision
    view: dict[str, Any]
    path: Path | None

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

    @property
    def kind(self) -> Kind | None:
        return self.decision.kind

    @property
    def first_failure(self) -> Address | None:
        return self.decision.first_failure

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The cause that reproduces a mismatch; None without one, cause "unexplained" if none of the catalogue does."""
        found = self.view["diagnosis"]
        return None if found is None else Diagnosis(Cause(found["cause"]), found["explained"], found["text"])

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        return self.decision.evidence

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        return self.decision.caveats

    @property
    def exit_code(self) -> int:
        """0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 6 INCONCLUSIVE."""
        return self.verdict.exit_code

    def to_json(self) -> str:
        """Return the report as strict JSON; non-finite figures are the strings "nan", "inf" and "-inf"."""
        return to_strict_json(self.view)

    def to_markdown(self) -> str:
        """Return the report for people."""
        return render_markdown(self.view)


def audit_engine(
    engine: Engine,
    plan: AuditPlan,
    prompts: Prompts | None,
    encode: Encode | None,
    *,
    out: Path | None,
    command: str | None = None,
    progress: Progress | None = None,
    scenarios: str | Sequence[str | Scenario] | None = None,
) -> Audit:
    """Audit an open engine.

    Raises:
        UsageError: a prompt does not fit the model, or `out` cannot be written.
        CaptureError: the engine broke off before anything could be compared.
    """
    progress = progress or Silent()
    info = engine.info
    with_decode, others = choose_scenarios(scenarios)
    if plan.lengths is not None and (others or not with_decode):
        raise UsageError(
            "--lengths sweeps plain decode, and a scenario runs on one prompt; leave out --scenario (scenarios=...) or "
            "--lengths (lengths=...)"
        )
    ids = _token_ids(plan, info, prompts, encode)
    if plan.ladder == "layer" and info.engine != "hf":
        raise UsageError(
            f"--ladder layer streams the weights of a torch model, and {info.engine} has none; use --ladder model or "
            "off (ladder=...)"
        )
    if plan.ladder == "off" and others:
        raise UsageError("scenarios are judged on the precision ladder; leave out --scenario, or --ladder off")
    with RunDirectory(out) as directory:
        rungs = rungs_of(plan, info)
        progress.start(len(ids) * (1 + with_decode * len(rungs)) + len(others) * len(rungs) + 2)
        fixed = []
        for name, tokens in ids.items():
            progress.step(f"{name}: the continuation")
            fixed.append(Prompt(name, tokens, continue_greedily(engine, tokens, plan.span)))
        run = Run(plan, info, fixed, created=datetime.now(UTC).isoformat(timespec="seconds"), command=command)
        store = TraceStore(directory.traces) if directory.traces is not None and plan.keep_traces else None
        company = Company(engine, others, fixed)
        suite = Suite(run, with_decode, company.scripts, company.passes)
        suite.open_runs()
        for rung in rungs:
            if with_decode:
                capture_rung(engine, run, rung, store, progress)
            capture_scenarios(engine, suite, company, rung, store, progress)
        progress.step("judging")
        judged = suite.judge()
        audit = Audit(judged.decision, build_suite_view(suite, judged), directory.target)
        if directory.work is not None:
            if store is not None:
                store.finish(describe_suite(suite))
            judged.run.table.write(directory.work)
            (directory.work / "report.json").write_text(audit.to_json(), encoding="utf-8")
            (directory.work / "report.md").write_text(audit.to_markdown(), encoding="utf-8")
            directory.commit()
    return audit


def _token_ids(
    plan: AuditPlan, info: EngineFacts, prompts: Prompts | None, encode: Encode | None
) -> dict[str, tuple[int, ...]]:
    limits: dict[str, Any] = {"vocab_size": info.vocab_size, "max_positions": info.max_positions, "span": plan.span}
    if plan.lengths is not None:
        return prompts_of_lengths(plan.lengths, prompts, encode, **limits)
    return tokenize(prompts if prompts is not None else default_prompts(encode, info.vocab_size), encode, **limits)


def capture_rung(engine: Engine, run: Run, rung: str, store: TraceStore | None, progress: Progress) -> None:
    """Capture every prompt at one rung. A rung that fails is a missing rung, except the native one: without it there
    is nothing to audit."""
    try:
        with engine.at(rung):
            for prompt in run.prompts:
                progress.step(f"{prompt.name}: prefill and decode at {rung}")
                _capture_one(engine, run, prompt, rung, store)
            if rung == run.control_rung:
                progress.step("the positive control")
                capture_positive_control(engine, run, store)
    except CaptureError as error:  # the model itself failed
        if rung == run.info.dtype:
            raise
        run.rung_failures[rung] = str(error)
    except KvdriftError:
        raise
    except (RuntimeError, MemoryError) as error:  # such as no memory for the weights at this dtype
        if rung == run.info.dtype:
            raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        run.rung_failures[rung] = f"{type(error).__name__}: {line}"


def _capture_one(engine: Engine, run: Run, prompt: Prompt, rung: str, store: TraceStore | None) -> None:
    """Capture, write and compare one prompt; its traces are gone before those of the next one are recorded."""
    captured = capture_prompt(
        engine,
        prompt,
        run.modes,
        rung,
        keep_inputs=run.wants_specification and rung == run.info.dtype,
        inputs=run.layer_inputs.pop(prompt.name, None) if rung == run.control_rung else None,
    )
    if store is not None:
        for pair in captured.pairs:
            store.add(pair, "pair")
        if captured.self_noise is not None:
            store.add(captured.self_noise, "self_noise")
        if captured.specification is not None:
            store.add(alone(captured.specification), SPECIFICATION)
        store.forget()
    run.add(captured)


def capture_positive_control(engine: Engine, run: Run, store: TraceStore | None) -> None:
    """Plant one small fault in one decode step, in the sharpest mode that runs, and record it."""
    found = _control_at_native(engine, run) if run.plan.ladder == "off" else _control_on_ladder(engine, run)
    if found is None:
        return
    run.plant, pair = found
    if store is not None:
        store.add(pair, CONTROL)
    run.add_control(pair)


def _control_on_ladder(engine: Engine, run: Run) -> tuple[Plant, PassPair] | None:
    mode = Mode.KV_ALIGNED if Mode.KV_ALIGNED in run.modes else Mode.AS_DESIGNED
    bounds = climb(run.table, str(mode), run.info.dtype, run.info.ladder).bounds
    site = next((site for site in SITES if any(site is place.site for place in bounds)), None)
    if site is None:
        return None
    pick = random.Random(run.plan.seed)
    layer = pick.choice(sorted(place.layer for place in bounds if place.site is site and place.layer is not None))
    prompt = min(run.prompts, key=lambda item: len(item.tokens))
    position = pick.choice(prompt.probed)
    plant = Plant(layer, site, 1.0 + planted_size(bounds[Place(layer, site)]))
    return plant, capture_control(engine, prompt, mode, run.control_rung, position, plant)


def _control_at_native(engine: Engine, run: Run) -> tuple[Plant, PassPair] | None:
    """Plant where the native instruments judge. The control's prefill is shorter than the run's, and its kernels may
    round otherwise: a place whose inputs are not equal there is not judged, and another one is taken."""
    native = run.info.dtype
    places = native_places(run.table, str(Mode.KV_ALIGNED), native, run.info.roundoffs)
    if Mode.KV_ALIGNED not in run.modes or not places:
        return None
    prompts = {prompt.name: prompt for prompt in run.prompts}
    found = None
    for address in random.Random(run.plan.seed).sample(places, min(_CONTROLS, len(places))):
        assert address.layer is not None  # controls are planted inside layers
        plant = Plant(address.layer, address.site, 1.0 + size_at_native(address.site, native, run.info.roundoffs))
        pair = capture_control(engine, prompts[address.prompt], Mode.KV_ALIGNED, native, address.position, plant)
        found = plant, pair
        trial = DriftTable()
        trial.add(pair, CONTROL, with_hashes=False)
        if fresh_rows(trial, CONTROL, native, run.info.roundoffs).index(address) is not None:
            break
    return found


def audit(
    model: Any,
    tokenizer: Any = None,
    *,
    prompts: Prompts | None = None,
    mode: ModeChoice = "both",
    span: int = 4,
    alpha: float = 1e-3,
    out: str | Path | None = None,
    layers: tuple[int, ...] | None = None,
    cache: str = "dynamic",
    ladder: LadderChoice = "model",
    seed: int = 0,
    scenarios: str | Sequence[str | Scenario] | None = None,
    lengths: Iterable[int] | None = None,
) -> Audit:
    """Audit a torch `PreTrainedModel`: does its cached decode compute what its prefill computes?

    The model is run as it is, with whatever modules or attention functions it has been given. Hooks, dtypes and
    registrations are restored afterwards, and its parameters are the same bits as before.

    Args:
        model: a decoder-only language model of transformers, on any device.
        tokenizer: needed only for prompts given as text.
        prompts: text or token ids by prompt id; default: three prompts of 1, 16 and 32 tokens or so.
        mode: "as_designed", "kv_aligned" or "both".
        span: how many tokens after each prompt are probed.
        alpha: chance of a false alarm that the whole audit may have.
        out: directory for the report and traces; None writes nothing.
        layers: layers to record, None for all.
        cache: "dynamic" or "static".
        ladder: "model" holds the whole model in float32 and float64 for the upper rungs, "layer" one layer at a time,
            "off" leaves these rungs out: then the native instruments decide alone.
        seed: picks where the positive control is planted.
        scenarios: routes to run, by name or as `kvdrift.Scenario`; "all" for all that apply; None for plain decode.
        lengths: prompt lengths in tokens, such as [64, 65, 128]: the longest prompt is cut or repeated to each of them,
            and the report names the length or position at which decode begins to behave differently.

    Raises:
        UsageError: an argument or a prompt does not fit the model.
        EngineUnavailable: the model has no cached decode step to audit.
        CaptureError: the model failed, or its weights are not finite.
    """
    from kvdrift.engines.hf.encode import encoder
    from kvdrift.engines.hf.engine import HFEngine

    sweep = None if lengths is None else sort_lengths(lengths)
    plan = AuditPlan(mode=mode, span=span, layers=layers, alpha=alpha, ladder=ladder, seed=seed, lengths=sweep)
    target = None if out is None else Path(out)
    with HFEngine(model, cache=cache, layers=layers, by_layer=ladder == "layer") as engine:
        return audit_engine(engine, plan, prompts, encoder(tokenizer), out=target, scenarios=scenarios)
