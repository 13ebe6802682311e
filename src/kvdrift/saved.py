"""Between a run and its saved traces: what the manifest says of it, and how it is built again without an engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from kvdrift.capture import PromptTokens
from kvdrift.engines.base import EngineInfo, Plant
from kvdrift.errors import TraceError, UsageError
from kvdrift.instruments.control import CONTROL
from kvdrift.instruments.ladder import SELF_NOISE, UNIT_ROUNDOFF
from kvdrift.plan import AuditPlan, Mode
from kvdrift.run import Run
from kvdrift.sites import Site
from kvdrift.trace.manifest import (
    FORMAT_VERSION,
    EngineEntry,
    Manifest,
    PairEntry,
    PlanEntry,
    PlantEntry,
    PromptEntry,
)
from kvdrift.trace.model import PassPair, Roundoffs, Rungs
from kvdrift.trace.store import read_manifest, read_pairs

_OUTSIDE = "outside"  # key of the sites outside the layers
_PAIR = "pair"


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
        ),
        plan=PlanEntry(
            mode=plan.mode,
            span=plan.span,
            layers=None if plan.layers is None else list(plan.layers),
            alpha=plan.alpha,
            seed=plan.seed,
        ),
        prompts=[PromptEntry(p.name, list(p.prompt), list(p.continuation)) for p in run.prompts],
        plant=None if run.plant is None else PlantEntry(run.plant.layer, str(run.plant.site), run.plant.factor),
        failures=dict(run.rung_failures),
        traces=[],
        pairs=[],
    )


class Progress(Protocol):
    """Hears how far the reading is."""

    def start(self, total: int) -> None: ...
    def step(self, text: str) -> None: ...


def read_run(directory: Path, *, alpha: float | None = None, progress: Progress | None = None) -> Run:
    """Build a run again from its directory, comparing every pair anew.

    Raises:
        TraceError: traces are missing, damaged or of another version, or are not those that the run's plan calls for.
        UsageError: `alpha` is not between 0 and 1.
    """
    traces = directory / "traces"
    if not traces.is_dir():
        raise TraceError(f"{directory} holds no traces to judge; it is no run directory, or was made with --no-traces")
    manifest = read_manifest(traces)
    try:
        run = _empty_run(manifest)
        _require_known_precision(run.info)
        _require_all_pairs(run, manifest.pairs)
        if progress is not None:
            progress.start(len(manifest.pairs))
        for entry, pair in read_pairs(traces, manifest):
            if progress is not None:
                progress.step(f"{entry.prompt}: {entry.role} at {entry.rung}")
            _require_roles(run, entry, pair)
            if entry.role == _PAIR:
                run.add_pair(pair)
            elif entry.role == SELF_NOISE:
                run.table.add(pair, SELF_NOISE, with_hashes=False)
            else:
                run.add_control(pair)
    except (ValueError, IndexError, KeyError, TypeError, UsageError) as error:
        raise TraceError(f"the traces in {traces} are not consistent: {error}; record the run again") from error
    if alpha is not None:
        run.plan = dataclasses.replace(run.plan, alpha=alpha)
    return run


def _require_known_precision(info: EngineInfo) -> None:
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


def _require_all_pairs(run: Run, pairs: Sequence[PairEntry]) -> None:
    """Check that the manifest lists what the plan calls for, once: a pair that was taken out is not a pair that agrees.

    A rung that could not run, away from the native one, may lack pairs: the ladder says then that it is incomplete.
    """
    prompts = {prompt.name: prompt for prompt in run.prompts}
    if len(prompts) != len(run.prompts) or not prompts:
        raise ValueError("the prompts have no ids, or one id twice")
    for prompt in run.prompts:
        if not prompt.prompt or len(prompt.continuation) != run.plan.span:
            raise ValueError(f"the prompt {prompt.name!r} has no tokens, or is not continued by {run.plan.span}")
    rungs = dict.fromkeys([run.info.dtype, run.info.ladder.lower, run.info.ladder.upper])
    wanted = {(_PAIR, str(mode), name, rung) for mode in run.modes for name in prompts for rung in rungs}
    wanted |= {
        (SELF_NOISE, str(Mode.AS_DESIGNED), prompt.name, rung)
        for prompt in run.prompts
        for rung in rungs
        if len(prompt.prompt) > 1
    }
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
    else:
        position = pair.positions[0]
        labels, lengths, positions = (CONTROL,), (position + 1,) * 2, (position,)
        if position not in prompt.probed or entry.rung != run.info.ladder.upper:
            raise ValueError(f"the positive control is at position {position} and {entry.rung}")
    passes = ("prefill", "prefill" if entry.role == SELF_NOISE else "decode")
    right = (
        (first.pass_name, second.pass_name) == passes
        and first is not second
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
    info = EngineInfo(
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
    )
    plant = manifest.plant
    return Run(
        AuditPlan(
            mode=plan.mode,  # type: ignore[arg-type]
            span=plan.span,
            layers=None if plan.layers is None else tuple(plan.layers),
            alpha=plan.alpha,
            seed=plan.seed,
        ),
        info,
        [PromptTokens(p.name, tuple(p.prompt), tuple(p.continuation)) for p in manifest.prompts],
        created=manifest.created,
        command=manifest.command,
        plant=None if plant is None else Plant(plant.layer, Site(plant.site), plant.factor),
        rung_failures=dict(manifest.failures),
    )
