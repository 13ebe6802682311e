"""Between a run and its saved traces: what the manifest says of it, and how it is built again without an engine."""

from __future__ import annotations

from pathlib import Path

from kvdrift.capture import PromptTokens
from kvdrift.engines.base import EngineInfo, Plant
from kvdrift.errors import TraceError
from kvdrift.instruments.ladder import SELF_NOISE
from kvdrift.plan import AuditPlan
from kvdrift.run import Run
from kvdrift.sites import Site
from kvdrift.trace.manifest import FORMAT_VERSION, EngineEntry, Manifest, PlanEntry, PlantEntry, PromptEntry
from kvdrift.trace.store import read_manifest, read_pairs

_OUTSIDE = "outside"  # key of the sites outside the layers


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


def read_run(directory: Path, *, alpha: float | None = None) -> Run:
    """Build a run again from its directory, comparing every pair anew.

    Raises:
        TraceError: traces are missing, damaged or of another version.
    """
    traces = directory / "traces"
    if not traces.is_dir():
        raise TraceError(f"{directory} holds no traces to judge; it is no run directory, or was made with --no-traces")
    manifest = read_manifest(traces)
    try:
        run = _empty_run(manifest, alpha)
        for entry, pair in read_pairs(traces, manifest):
            if entry.role == "pair":
                run.add_pair(pair)
            elif entry.role == "self_noise":
                run.table.add(pair, SELF_NOISE, with_hashes=False)
            elif entry.role == "control":
                run.add_control(pair)
            else:
                raise TraceError(f"{traces} has a pair of the unknown role {entry.role!r}")
    except (ValueError, IndexError, KeyError) as error:
        raise TraceError(f"the traces in {traces} are not consistent: {error}") from error
    return run


def _empty_run(manifest: Manifest, alpha: float | None) -> Run:
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
    )
    plant = manifest.plant
    return Run(
        AuditPlan(
            mode=plan.mode,  # type: ignore[arg-type]
            span=plan.span,
            layers=None if plan.layers is None else tuple(plan.layers),
            alpha=plan.alpha if alpha is None else alpha,
            seed=plan.seed,
        ),
        info,
        [PromptTokens(p.name, tuple(p.prompt), tuple(p.continuation)) for p in manifest.prompts],
        created=manifest.created,
        command=manifest.command,
        plant=None if plant is None else Plant(plant.layer, Site(plant.site), plant.factor),
        rung_failures=dict(manifest.failures),
    )
