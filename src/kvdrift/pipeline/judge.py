"""Judges a directory of traces: that of an audit, or one that another program wrote. Both go the same way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import msgspec

from kvdrift import __version__
from kvdrift.capture.control import is_control_seen, plant_in_values
from kvdrift.diagnosis.model import collect
from kvdrift.errors import TraceError, UsageError
from kvdrift.instruments.base import Foreign
from kvdrift.measure.measured import Measured
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.ranks import guilty_rank
from kvdrift.pipeline.readers import open_recording
from kvdrift.report.scenarios import build_suite_view
from kvdrift.trace.readers.own import inconsistent
from kvdrift.trace.recording import Recording
from kvdrift.verdict.judge import decide_route
from kvdrift.verdict.suite import Suite, script_of
from kvdrift.vocabulary.evidence import Caveat
from kvdrift.vocabulary.facts import Passes, is_absent
from kvdrift.vocabulary.plan import AuditPlan, Mode, PairRole
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift.vocabulary.scope import Scope, parse_scope

_PLANTED = Caveat(
    "CONTROL_IN_VALUES",
    "the positive control was planted in the recorded values: it shows that the judging sees a fault there, not "
    "that the engine's own recording would",
)


def judge_directory(
    directory: Path,
    kind: str = "auto",
    *,
    alpha: float | None = None,
    scope: Iterable[str] = (),
    progress: Progress | None = None,
    command: str | None = None,
) -> tuple[Audit, str | None]:
    """Return the judged directory, and what was recognised in it; None for an audit's own.

    Args:
        directory: holds the traces.
        kind: "auto", or the format that the files are to be read as.
        alpha: chance of a false alarm; None for the one that the traces were recorded with, or the default.
        scope: what the verdict is about, if it is about less than everything: "attention", "layers=0-3",
            "up-to=attn_ctx" or "sampled".
        progress: hears of every pair of passes.
        command: what the report of foreign files names to reproduce it.

    Raises:
        TraceError: the files are of no known format, are damaged, or contradict themselves.
        UsageError: the format, the scope or alpha is not usable.
    """
    asked = parse_scope(scope)
    recording = open_recording(directory, kind)
    if asked.up_to is not None and is_absent(recording.facts, asked.up_to):
        raise UsageError(f"the model has no {asked.up_to}, so nothing can be claimed up to it; name another --scope")
    try:
        suite = read_suite(recording, directory, alpha=alpha, scope=asked, progress=progress, command=command)
        audit = judge_recording(suite, recording, directory)
    finally:
        recording.close()
    return audit, None if recording.manifest is not None else recording.kind


def judge_recording(suite: Suite, recording: Recording, directory: Path | None = None) -> Audit:
    """Judge a suite that was read from `recording`; `directory` becomes the path of the result."""
    if recording.manifest is None:
        _keep_suspects(suite.base, recording)
    judged = suite.judge()
    return Audit(judged, build_suite_view(suite, judged), directory)


def read_suite(
    recording: Recording,
    directory: Path,
    *,
    alpha: float | None = None,
    scope: Scope | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Suite:
    """Compare everything that a recording holds.

    Raises:
        TraceError: the files contradict themselves.
        UsageError: `alpha` is not between 0 and 1.
    """
    progress = progress or Silent()
    suite = _opened(recording, alpha, command)
    for run in (suite.base, *suite.runs.values()):
        run.asked = scope or Scope()
    progress.start(recording.n_pairs)
    try:
        for item in recording.pairs():
            progress.step(f"{item.scenario or item.pair.decode.prompt}: {item.role} at {item.pair.prefill.rung}")
            suite.add(item)
            control = None if suite.base.foreign is None else plant_in_values(suite.base, item)
            if control is not None:
                # Routes and attention statistics are those of the clean pair.
                suite.base.replace_control(control)
        if suite.base.foreign is not None:
            _plant_anew(suite.base, recording)
    except (ValueError, IndexError, KeyError, TypeError, UsageError) as error:
        if recording.manifest is not None:
            raise TraceError(inconsistent(directory, error)) from error
        if isinstance(error, UsageError):
            raise
        raise TraceError(f"the traces are not consistent: {error}; record them again") from error
    return suite


def _plant_anew(measured: Measured, recording: Recording) -> None:
    """Plant the positive control once more where it was not seen.

    The bounds that hold for it, such as what an operation pinned inside the fine rung raises them to, are known only
    when all files were read.
    """
    if measured.plant is None or is_control_seen(measured):
        return
    for item in recording.pairs():
        control = plant_in_values(measured, item, anew=True)
        if control is not None:
            measured.replace_control(control)
            if is_control_seen(measured):
                return


def _opened(recording: Recording, alpha: float | None, command: str | None) -> Suite:
    """Return the empty suite that a recording fills."""
    manifest = recording.manifest
    if manifest is None:
        return Suite(_foreign(recording, alpha, command, {"kvdrift": __version__}))
    plan = manifest.plan if alpha is None else msgspec.structs.replace(manifest.plan, alpha=alpha)
    measured = Measured(
        plan,
        manifest.engine,
        list(manifest.prompts),
        created=manifest.created,
        command=manifest.command,
        plant=manifest.plant,
        rung_failures=dict(manifest.failures),
    )
    scripts = [script_of(entry) for entry in manifest.scenarios]
    suite = Suite(measured, manifest.has_decode, scripts, manifest.passes or Passes())
    for entry in manifest.scenarios:
        if entry.name in suite.runs:
            suite.runs[entry.name].plant = entry.plant
    return suite


def _foreign(
    recording: Recording,
    alpha: float | None,
    command: str | None,
    versions: Mapping[str, str] = MappingProxyType({}),
) -> Measured:
    """Return the empty route that files of another program fill; `versions` are those of what judges."""
    facts, modes = recording.facts, recording.modes
    plan = AuditPlan(
        mode="both" if len(modes) != 1 else modes[0].value,
        span=max([1, *(len(prompt.continuation) for prompt in recording.prompts)]),
        alpha=AuditPlan().alpha if alpha is None else alpha,
    )
    info = msgspec.structs.replace(
        facts,
        notes=(f"read as {recording.kind}", *facts.notes),
        versions={**facts.versions, **versions},
    )
    return Measured(
        plan,
        info,
        list(recording.prompts),
        # The date of the report, where the files have none of their own.
        created=recording.created or datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or recording.command,
        foreign=Foreign(
            computed_in=recording.computed_in,
            plausible=recording.plausible,
            sampled=recording.sampled,
            n_layers=facts.n_layers if recording.last_layer_known else 0,
            remarks=(*(Caveat(code, text) for code, text in recording.remarks), _PLANTED),
            gaps=recording.gaps,
            offsets=recording.offsets,
            missing={mode: "the files hold no such decode pass" for mode in Mode if mode not in modes},
        ),
    )


def _keep_suspects(measured: Measured, recording: Recording) -> None:
    """Read the first failure again, and keep of it what a diagnosis needs, and the rank that made it.

    Foreign files are judged by bounds that are known only when all of them were read.
    """
    decision = decide_route(measured)
    first = decision.first_failure
    if first is None or measured.foreign is None:
        return
    explain = decision.kind != "semantic" and not any(c.code == "SAMPLED" for c in decision.caveats)
    modes = {outcome.mode for outcome in decision.outcomes if outcome.first_failure == first}
    for item in recording.pairs():
        pair = item.pair
        if (
            item.role is PairRole.PAIR
            and pair.mode in modes
            and (pair.prefill.prompt, pair.prefill.rung) == (first.prompt, measured.info.dtype)
        ):
            if explain:
                kept = collect(pair, first, measured.info.arithmetic)
                measured.suspects.kept[pair.mode, measured.info.dtype] = kept
            if (rank := guilty_rank(pair, first)) is not None:
                remarks = (*measured.foreign.remarks, rank)
                measured.foreign = dataclasses.replace(measured.foreign, remarks=remarks)
            return
