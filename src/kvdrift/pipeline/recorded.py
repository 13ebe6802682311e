"""Judges what other programs recorded: opens a directory of trace files in any known format and makes a run of it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

import numpy as np

from kvdrift.compare.drift import DriftTable
from kvdrift.compare.rows import Block
from kvdrift.diagnosis.model import collect
from kvdrift.errors import TraceError, UsageError
from kvdrift.instruments.control import SITES, planted_size
from kvdrift.instruments.ladder import rounding_bounds
from kvdrift.instruments.recorded import Terms, plantable
from kvdrift.measure.measured import Run
from kvdrift.trace.model import PassPair, RowRecord, Trace
from kvdrift.trace.readers.debugger import is_debugger, open_debugger
from kvdrift.trace.readers.greta.reader import open_greta
from kvdrift.trace.readers.npz import is_npz, open_npz
from kvdrift.trace.readers.sglang import open_sglang
from kvdrift.trace.readers.written import is_written, open_written
from kvdrift.trace.recording import RecordedPair, Recording, files_under
from kvdrift.trace.store import MANIFEST
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.findings import Recorded
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, AuditPlan, Mode
from kvdrift.vocabulary.precision import UPPER
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift.vocabulary.sites import Site


def run_of(
    recording: Recording,
    *,
    alpha: float | None = None,
    progress: Progress | None = None,
    command: str | None = None,
    versions: Mapping[str, str] = MappingProxyType({}),
) -> Run:
    """Compare everything that a recording holds; `versions` are those of what judges.

    Raises:
        TraceError: the files contradict themselves.
        UsageError: `alpha` is not between 0 and 1.
    """
    heard = progress or Silent()
    run = _empty_run(recording, alpha, command, versions)
    heard.start(recording.n_pairs)
    try:
        for item in recording.pairs():
            heard.step(f"{item.pair.prefill.prompt}: {item.role} at {item.pair.prefill.rung}")
            _add(run, item)
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise TraceError(f"the traces are not consistent: {error}; record them again") from error
    return run


def judge_recording(run: Run, recording: Recording) -> Decision:
    """Judge a run, and keep of its files what a diagnosis needs."""
    decision = run.decide()
    first = decision.first_failure
    if first is not None and decision.kind != "semantic" and not any(c.code == "SAMPLED" for c in decision.caveats):
        modes = {o.mode for o in decision.outcomes if o.first_failure == first}
        for item in recording.pairs():
            pair = item.pair
            if (
                item.role == "pair"
                and str(pair.mode) in modes
                and (pair.prefill.prompt, pair.prefill.rung) == (first.prompt, run.info.dtype)
            ):
                run.suspects.kept[str(pair.mode), run.info.dtype] = collect(pair, first)
                break
    return decision


def _empty_run(recording: Recording, alpha: float | None, command: str | None, versions: Mapping[str, str]) -> Run:
    facts, modes = recording.facts, recording.modes
    prompts = [_prompt_tokens(p.name, p.tokens, p.probed) for p in recording.prompts]
    plan = AuditPlan(
        mode="both" if len(modes) != 1 else modes[0].value,
        span=max([1, *(len(p.continuation) for p in prompts)]),
        alpha=AuditPlan().alpha if alpha is None else alpha,
    )
    info = EngineFacts(
        engine=facts.engine,
        model=facts.model,
        model_hash=facts.model_hash,
        dtype=facts.stored,
        device=facts.device,
        attention=facts.attention,
        cache=facts.cache,
        n_layers=facts.n_layers,
        vocab_size=facts.vocab_size,
        max_positions=facts.max_positions,
        parameters=facts.parameters,
        can_rewind=True,
        notes=(f"read as {recording.kind}", *facts.notes),
        versions={**facts.versions, **versions},
    )
    missing = {str(mode): "the files hold no such decode pass" for mode in Mode if mode not in modes}
    planted = (
        "CONTROL_IN_VALUES",
        "the positive control was planted in the recorded values: it shows that the judging sees a fault there, not "
        "that the engine's own recording would",
    )
    remarks = [Caveat(code, text) for code, text in (*recording.remarks, planted)]
    return Run(
        plan,
        info,
        prompts,
        # The date of the report, where the files have none of their own.
        created=recording.created or datetime.now(UTC).isoformat(timespec="seconds"),
        command=command or recording.command,
        recorded=Recorded(
            arithmetic=facts.arithmetic,
            n_layers=facts.n_layers if facts.last_layer_known else 0,
            remarks=tuple(remarks),
            gaps=recording.gaps,
            missing=missing,
        ),
    )


def _prompt_tokens(name: str, tokens: tuple[int, ...], probed: tuple[int, ...]) -> Prompt:
    first, last = (probed[0], probed[-1]) if probed else (len(tokens), len(tokens))
    return Prompt(name, tokens[:first], tokens[first : last + 1])


def _add(run: Run, item: RecordedPair) -> None:
    pair = item.pair
    if item.role == "self_noise":
        _mark_unequal(run.table, run.table.add(pair, SELF_NOISE, with_hashes=False), item)
        return
    run.add_pair(pair)
    _mark_unequal(run.table, run.table.blocks[-1], item)
    if pair.prefill.rung in (run.info.dtype, UPPER):
        _plant(run, pair)


def _mark_unequal(table: DriftTable, block: Block, item: RecordedPair) -> None:
    """Take the word of the engine's own hashes where the recorded digits agree and they do not."""
    if not item.unequal:
        return
    rows = table.rows_of(block)
    unequal = [(address.layer, address.site, address.position) in item.unequal for address in rows.addresses()]
    hidden = rows.equal & np.array(unequal, dtype=bool)
    table.replace_block(
        block,
        equal=rows.equal & ~hidden,
        n_differ=np.where(hidden, 1, rows.n_differ),
        rel_l2=np.where(hidden, item.digits, rows.rel_l2),
    )


def _plant(run: Run, pair: PassPair) -> None:
    """Plant the positive control in the recorded values of one decode step, on the finest rung that there is."""
    rung = pair.prefill.rung
    if run.plant is not None and (rung != UPPER or (run.control_mode is not None and _is_at(run, UPPER))):
        return
    where = _place_on_ladder(run, pair) if rung == UPPER else _place_at_native(run, pair)
    if where is None:
        return
    address, size = where
    decode = _scaled(pair.decode, address, 1.0 + size)
    if decode is None or address.layer is None:
        return
    run.table.forget(CONTROL)
    run.plant = Plant(address.layer, address.site, 1.0 + size)
    # Routes and attention statistics are those of the clean pair.
    run.add_control(PassPair(pair.mode, pair.prefill, decode, (address.position,)))
    # What has no partner there is counted with the clean pair.
    run.table.unpaired = [value for value in run.table.unpaired if value[0] != CONTROL]


def _is_at(run: Run, rung: str) -> bool:
    return len(run.table.select(CONTROL, rung)) > 0


def _place_on_ladder(run: Run, pair: PassPair) -> tuple[Address, float] | None:
    bounds = rounding_bounds(run.table, str(pair.mode))
    rows = run.table.select(pair.mode, UPPER)
    bound = rows.by_place(bounds)
    fits = rows.of_prompt(pair.prefill.prompt) & ~rows.is_outside & (rows.rel_l2 <= bound)
    for site in (*SITES, *Site):
        found = np.flatnonzero(fits & rows.is_at(site))
        if len(found):
            first = found[np.argmin(rows.layer[found])]
            return rows.addresses(first[None])[0], planted_size(float(bound[first]))
    return None


def _place_at_native(run: Run, pair: PassPair) -> tuple[Address, float] | None:
    assert run.recorded is not None
    terms = Terms(str(pair.mode), run.info.dtype, run.recorded.arithmetic, run.recorded.n_layers)
    return plantable(run.table, terms, pair.prefill.prompt)


def _scaled(trace: Trace, address: Address, factor: float) -> Trace | None:
    """Return a copy of a trace with the values at one address multiplied; None if they are not rows of it."""
    rows, hit = [], False
    for record in trace.rows:
        if (record.layer, record.site) == address.place and address.position in record.positions:
            values = record.values.copy()
            index = record.positions.index(address.position)
            values[index] = (values[index].astype(np.float64) * factor).astype(values.dtype)
            hit = hit or bool((values[index] != record.values[index]).any())
            rows.append(RowRecord(record.layer, record.site, record.positions, values, record.slots))
        else:
            rows.append(record)
    if not hit:
        return None
    return Trace(
        trace.prompt,
        trace.pass_name,
        "control",
        trace.rung,
        trace.tokens,
        trace.calls,
        rows,
        trace.cache,
        trace.attention,
    )


FORMATS = ("auto", "kvdrift", "greta", "sglang", "npz", "transformers-debug")


def is_audit(directory: Path) -> bool:
    """Whether a directory is that of an audit, whose traces `kvdrift.pipeline.saved` reads."""
    return (directory / "traces").is_dir() and not (directory / MANIFEST).is_file()


def open_recording(directory: Path, kind: str = "auto") -> Recording:
    """Open a directory of trace files.

    Raises:
        UsageError: the format is unknown.
        TraceError: the files are of no known format, or cannot be read.
    """
    if kind not in FORMATS:
        raise UsageError(f"unknown format {kind!r}; use --format {', '.join(FORMATS)} (kind=...)")
    found = _recognise(directory) if kind == "auto" else kind
    if found == "greta":
        return open_greta(directory)
    if found == "npz":
        return open_npz(directory)
    if found == "transformers-debug":
        return open_debugger(directory)
    if found == "sglang":
        from kvdrift.engines.torch_files import read_tensor_file

        return open_sglang(directory, read_tensor_file)
    return open_written(directory)


def _recognise(directory: Path) -> str:
    """Return the format of the files in a directory, by what only that format has."""
    if is_written(directory):
        return "kvdrift"
    if is_debugger(directory):
        return "transformers-debug"
    if is_npz(directory):
        return "npz"
    if files_under(directory, ".pt"):
        return "sglang"
    if files_under(directory, ".jsonl", ".jsonl.gz"):
        return "greta"
    raise TraceError(
        f"{directory} holds no traces to judge; it is no run directory, was made with --no-traces, or holds files of "
        f"no known format (--format knows {', '.join(FORMATS[1:])})"
    )
