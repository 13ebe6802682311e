"""Between a run and its saved traces: what the manifest says of it, and how it is built again without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import msgspec

from kvdrift.capture.prompts import name_of_length
from kvdrift.errors import TraceError, UsageError
from kvdrift.measure.measured import Run
from kvdrift.pipeline.saved_scenarios import add_scenario_pair, require_scenario_pairs
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.runner import Passes, Script
from kvdrift.trace.manifest import (
    FORMAT_VERSION,
    EngineEntry,
    Manifest,
    PairEntry,
    PassesEntry,
    PlanEntry,
    PlantEntry,
    PromptEntry,
    ScenarioEntry,
    SegmentEntry,
)
from kvdrift.trace.model import PassPair
from kvdrift.trace.store import read_manifest, read_pairs
from kvdrift.verdict.suite import Suite
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt, Segment
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, SPECIFICATION, AuditPlan, Mode
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF, UPPER, Roundoffs, Rungs
from kvdrift.vocabulary.progress import Progress
from kvdrift.vocabulary.sites import Site

_OUTSIDE = "outside"  # key of the sites outside the layers
_PAIR = "pair"


def describe_suite(suite: Suite) -> Manifest:
    """Return the manifest of a suite; the store fills in traces and pairs."""
    return msgspec.structs.replace(
        describe_run(suite.base),
        scenarios=[_scenario_entry(script, suite.runs.get(script.scenario.name)) for script in suite.scripts],
        has_decode=suite.with_decode,
        passes=PassesEntry(suite.passes.made, suite.passes.saved),
    )


def _scenario_entry(script: Script, run: Run | None) -> ScenarioEntry:
    return ScenarioEntry(
        name=script.scenario.name,
        finds=script.scenario.finds,
        segments=[
            SegmentEntry(s.name, list(s.tokens), list(s.positions), s.choice, s.quantised, s.n_first)
            for s in script.segments
        ],
        not_applicable=script.not_applicable,
        failure=script.failure,
        plant=None if run is None else _plant_entry(run.plant),
    )


def _plant_entry(plant: Plant | None) -> PlantEntry | None:
    return None if plant is None else PlantEntry(plant.layer, str(plant.site), plant.factor)


def _plant(entry: PlantEntry | None) -> Plant | None:
    return None if entry is None else Plant(entry.layer, Site(entry.site), entry.factor)


def describe_run(run: Run) -> Manifest:
    """Return the manifest of a run; the store fills in traces and pairs."""
    info, plan = run.info, run.plan
    return Manifest(
        format_version=FORMAT_VERSION,
        created=run.created,
        command=run.command,
        engine=EngineEntry(
            engine=info.engine,
            model=info.model,
            model_hash=info.model_hash,
            dtype=info.dtype,
            device=info.device,
            attention=info.attention,
            cache=info.cache,
            n_layers=info.n_layers,
            vocab_size=info.vocab_size,
            max_positions=info.max_positions,
            parameters=info.parameters,
            can_rewind=info.can_rewind,
            why_no_rewind=info.why_no_rewind,
            sites={_OUTSIDE if k is None else str(k): [str(site) for site in v] for k, v in info.sites.items()},
            notes=list(info.notes),
            versions=dict(info.versions),
            ladder=(info.ladder.lower, info.ladder.upper),
            pinned=info.ladder.pinned,
            roundoffs=None if info.roundoffs is None else dataclasses.asdict(info.roundoffs),
            experts_per_token=info.experts_per_token,
        ),
        plan=PlanEntry(
            mode=plan.mode,
            span=plan.span,
            layers=None if plan.layers is None else list(plan.layers),
            alpha=plan.alpha,
            seed=plan.seed,
            ladder=plan.ladder,
            lengths=None if plan.lengths is None else list(plan.lengths),
        ),
        prompts=[PromptEntry(p.name, list(p.prompt), list(p.continuation)) for p in run.prompts],
        plant=_plant_entry(run.plant),
        failures=dict(run.rung_failures),
        specification=bool(run.errors.units),
        traces=[],
        pairs=[],
    )


def read_run(directory: Path, *, alpha: float | None = None, progress: Progress | None = None) -> Run:
    """Build the plain decode run of a directory again; see `read_suite`."""
    return read_suite(directory, alpha=alpha, progress=progress).base


def read_suite(directory: Path, *, alpha: float | None = None, progress: Progress | None = None) -> Suite:
    """Build a run and its scenarios again from their directory, comparing every pair anew.

    Raises:
        TraceError: traces are missing, damaged or of another version, or are not those that the run's plan calls for.
        UsageError: `alpha` is not between 0 and 1.
    """
    traces = directory / "traces"
    if not traces.is_dir():
        raise TraceError(f"{directory} holds no traces to judge; it is no run directory, or was made with --no-traces")
    manifest = read_manifest(traces)
    if alpha is not None:
        AuditPlan(alpha=alpha)
    try:
        run = _empty_run(manifest)
        _require_known_precision(run.info)
        if alpha is not None:
            run.plan = dataclasses.replace(run.plan, alpha=alpha)
        suite = _empty_suite(run, manifest)
        own = [pair for pair in manifest.pairs if pair.scenario is None]
        if manifest.has_decode:
            _require_all_pairs(run, own, specified=manifest.specification)
        elif own:
            raise ValueError(f"{len(own)} pairs are of plain decode, which is not part of the run")
        require_scenario_pairs(suite, [pair for pair in manifest.pairs if pair.scenario is not None])
        if progress is not None:
            progress.start(len(manifest.pairs))
        for entry, pair in read_pairs(traces, manifest):
            if progress is not None:
                progress.step(f"{entry.scenario or entry.prompt}: {entry.role} at {entry.rung}")
            if entry.scenario is not None:
                add_scenario_pair(suite, entry, pair)
                continue
            _require_roles(run, entry, pair)
            if entry.role == _PAIR:
                run.add_pair(pair)
            elif entry.role == SELF_NOISE:
                run.table.add(pair, SELF_NOISE, with_hashes=False)
            elif entry.role == SPECIFICATION:
                run.errors.compare(pair.prefill)
            else:
                run.add_control(pair)
    except (ValueError, IndexError, KeyError, TypeError, UsageError) as error:
        raise TraceError(f"the traces in {traces} are not consistent: {error}; record the run again") from error
    return suite


def _empty_suite(run: Run, manifest: Manifest) -> Suite:
    scripts = [
        Script(
            Scenario(entry.name, entry.finds, _cannot_run),
            [
                Segment(s.name, tuple(s.tokens), list(s.positions), s.choice, s.quantised, s.n_first)
                for s in entry.segments
            ],
            entry.not_applicable,
            entry.failure,
        )
        for entry in manifest.scenarios
    ]
    if len({script.scenario.name for script in scripts}) != len(scripts):
        raise ValueError("a scenario is listed twice")
    if not manifest.has_decode and not scripts:
        raise ValueError("it holds neither plain decode nor a scenario")
    passes = Passes() if manifest.passes is None else Passes(manifest.passes.made, manifest.passes.saved)
    suite = Suite(run, manifest.has_decode, scripts, passes)
    suite.open_runs()
    for entry in manifest.scenarios:
        if entry.name in suite.runs:
            suite.runs[entry.name].plant = _plant(entry.plant)
    return suite


def _cannot_run(stage: object) -> None:
    raise UsageError("a scenario that was read from traces has no steps to run")


def _require_known_precision(info: EngineFacts) -> None:
    """Check that how coarsely every rung rounds is known: a dtype, or roundoffs of the native precision's own."""
    ladder = info.ladder
    coarse, fine = UNIT_ROUNDOFF.get(ladder.lower), UNIT_ROUNDOFF.get(ladder.upper)
    if coarse is None or fine is None or not coarse > fine:
        raise ValueError(f"{ladder.lower} and {ladder.upper} are no coarse and fine rung of a ladder")
    if not 0.0 <= ladder.pinned <= coarse:
        raise ValueError(f"nothing can be pinned at {ladder.pinned} above the rung {ladder.lower}")
    if info.roundoffs is None and info.dtype not in UNIT_ROUNDOFF:
        raise ValueError(f"unknown dtype {info.dtype!r}")
    if info.roundoffs is not None and not all(0.0 < unit < 1.0 for unit in dataclasses.astuple(info.roundoffs)):
        raise ValueError("the roundoffs of the native precision are not between 0 and 1")


def _require_all_pairs(run: Run, pairs: Sequence[PairEntry], *, specified: bool) -> None:
    """Check that the manifest lists what the plan calls for, once: a pair that was taken out is not a pair that agrees.

    A rung that could not run, away from the native one, may lack pairs: the ladder says then that it is incomplete.
    """
    prompts = {prompt.name: prompt for prompt in run.prompts}
    if len(prompts) != len(run.prompts) or not prompts:
        raise ValueError("the prompts have no ids, or one id twice")
    for prompt in run.prompts:
        if not prompt.prompt or len(prompt.continuation) != run.plan.span:
            raise ValueError(f"the prompt {prompt.name!r} has no tokens, or is not continued by {run.plan.span}")
    if run.plan.lengths is not None and {name: len(p.prompt) for name, p in prompts.items()} != {
        name_of_length(length): length for length in run.plan.lengths
    }:
        raise ValueError(f"the prompts are not those of the lengths {list(run.plan.lengths)}")
    rungs = run.rungs
    wanted = {(_PAIR, str(mode), name, rung) for mode in run.modes for name in prompts for rung in rungs}
    wanted |= {
        (SELF_NOISE, str(Mode.AS_DESIGNED), prompt.name, rung)
        for prompt in run.prompts
        for rung in rungs
        if len(prompt.prompt) > 1
    }
    if run.wants_specification and specified:
        wanted |= {(SPECIFICATION, str(Mode.KV_ALIGNED), name, UPPER) for name in prompts}
    found = [(pair.role, pair.mode, pair.prompt, pair.rung) for pair in pairs if pair.role != CONTROL]
    missing = [
        key for key in sorted(wanted - set(found)) if key[3] == run.info.dtype or key[3] not in run.rung_failures
    ]
    if missing:
        raise ValueError(f"{len(missing)} pairs of passes are missing, such as {_words(missing[0])}")
    if surplus := sorted(set(found) - wanted):
        raise ValueError(f"{_words(surplus[0])} is not part of the run")
    if len(found) != len(set(found)):
        raise ValueError("a pair of passes is listed twice")
    controls = [pair for pair in pairs if pair.role == CONTROL]
    if len(controls) != (run.plant is not None):
        raise ValueError(f"{len(controls)} positive controls are listed, and {int(run.plant is not None)} was planted")


def _words(key: tuple[str, str, str, str]) -> str:
    role, mode, prompt, rung = key
    return f"{role} of {prompt!r} in {mode} at {rung}"


def _require_roles(run: Run, entry: PairEntry, pair: PassPair) -> None:
    """Check that two traces are what the pair says they are: the right passes over the right tokens."""
    prompt = next((prompt for prompt in run.prompts if prompt.name == entry.prompt), None)
    if prompt is None:
        raise ValueError(f"a pair is of the prompt {entry.prompt!r}, which the run does not have")
    last = len(prompt.prompt) - 1
    first, second = pair.prefill, pair.decode
    if entry.role == _PAIR:
        labels, lengths, positions = (str(pair.mode),), (len(prompt.tokens),) * 2, prompt.probed
    elif entry.role == SELF_NOISE:
        labels, lengths, positions = ("prompt_alone",), (len(prompt.tokens), len(prompt.prompt)), (last,)
    elif entry.role == SPECIFICATION:
        labels, lengths, positions = (SPECIFICATION,), (len(prompt.tokens),) * 2, prompt.probed
    else:
        position = pair.positions[0]
        labels, lengths, positions = (CONTROL,), (position + 1,) * 2, (position,)
        if position not in prompt.probed or entry.rung != run.control_rung:
            raise ValueError(f"the positive control is at position {position} and {entry.rung}")
    passes = ("prefill", "prefill" if entry.role in (SELF_NOISE, SPECIFICATION) else "decode")
    right = (
        (first.pass_name, second.pass_name) == passes
        and (first is not second) == (entry.role != SPECIFICATION)
        and second.label in labels
        and {first.rung, second.rung} == {entry.rung}
        and {first.prompt, second.prompt} == {entry.prompt}
        and pair.positions == positions
        and (first.tokens, second.tokens) == (prompt.tokens[: lengths[0]], prompt.tokens[: lengths[1]])
    )
    if not right:
        raise ValueError(f"{_words((entry.role, entry.mode, entry.prompt, entry.rung))} joins traces of something else")


def _empty_run(manifest: Manifest) -> Run:
    entry, plan = manifest.engine, manifest.plan
    info = EngineFacts(
        engine=entry.engine,
        model=entry.model,
        model_hash=entry.model_hash,
        dtype=entry.dtype,
        device=entry.device,
        attention=entry.attention,
        cache=entry.cache,
        n_layers=entry.n_layers,
        vocab_size=entry.vocab_size,
        max_positions=entry.max_positions,
        parameters=entry.parameters,
        can_rewind=entry.can_rewind,
        why_no_rewind=entry.why_no_rewind,
        sites={None if k == _OUTSIDE else int(k): tuple(Site(s) for s in v) for k, v in entry.sites.items()},
        notes=tuple(entry.notes),
        versions=dict(entry.versions),
        ladder=Rungs(*entry.ladder, pinned=entry.pinned),
        roundoffs=None if entry.roundoffs is None else Roundoffs(**entry.roundoffs),
        experts_per_token=entry.experts_per_token,
    )
    return Run(
        AuditPlan(
            mode=plan.mode,  # type: ignore[arg-type]
            span=plan.span,
            layers=None if plan.layers is None else tuple(plan.layers),
            alpha=plan.alpha,
            seed=plan.seed,
            ladder=plan.ladder,  # type: ignore[arg-type]
            lengths=None if plan.lengths is None else tuple(plan.lengths),
        ),
        info,
        [Prompt(p.name, tuple(p.prompt), tuple(p.continuation)) for p in manifest.prompts],
        created=manifest.created,
        command=manifest.command,
        plant=_plant(manifest.plant),
        rung_failures=dict(manifest.failures),
    )
