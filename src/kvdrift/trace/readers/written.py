"""Trace directories that other programs wrote: the part of the manifest that they must fill, and how passes pair up.

The files are those of an audit. The manifest is a smaller one: it has no plan and lists no pairs, since these follow
from the passes themselves. docs/trace-format.md specifies it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import msgspec

from kvdrift.errors import AlignmentError, TraceError
from kvdrift.trace.manifest import LayerAttention, RecordEntry, TraceEntry
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.readers.absent import absent_sites, without
from kvdrift.trace.readers.holes import compared_positions
from kvdrift.trace.recording import MAX_POSITION, RecordedPair, Recording
from kvdrift.trace.store import MANIFEST, read_json, read_trace
from kvdrift.vocabulary.facts import Call, EngineFacts, Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import CACHE_SITES, Site

FORMAT = "kvdrift-trace"
FORMAT_VERSION = 1
# History of the format:
#   1  first version

PREFILL, DECODE, PREFILL_AGAIN = "prefill", "decode", "prefill_again"
RUNGS = ("bfloat16", "float16", "float32", "float64")  # from coarse to fine, the order in which they are read

# Facts that kvdrift finds out itself; another program has no way to know them.
OF_AUDITS = (
    "perturbable",
    "can_rewind",
    "why_no_rewind",
    "rewinds_once",
    "sites",
    "rungs",
    "pinned",
    "roundoffs",
    "experts_per_token",
)
_NOTHING_STATED = EngineFacts(engine="", model="", dtype="", n_layers=1)


class WrittenTrace(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """One pass over one prompt at one dtype."""

    name: str
    file: str
    prompt: str
    pass_name: str
    rung: str
    tokens: list[int]
    records: list[RecordEntry]
    mode: str | None = None
    calls: list[Call] = []
    attention: list[LayerAttention] = []
    sha256: str | None = None


class WrittenManifest(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """manifest.json of a directory that another program wrote."""

    format: str
    format_version: int
    engine: EngineFacts
    traces: list[WrittenTrace]
    absent: list[str] = []
    created: str | None = None
    command: str | None = None


def is_written(directory: Path) -> bool:
    """Whether a directory holds a manifest of its own, as written traces do."""
    return (directory / MANIFEST).is_file()


def open_written(directory: Path) -> Recording:
    """Open a directory of written traces.

    Raises:
        TraceError: the manifest is missing, damaged, of another version, or contradicts itself.
    """
    path = directory / MANIFEST
    manifest = read_json(path, WrittenManifest, FORMAT_VERSION)
    if manifest.format != FORMAT:
        raise TraceError(f"{path} is of the format {manifest.format!r}, and written traces are {FORMAT!r}")
    engine = manifest.engine
    if engine.dtype not in RUNGS:
        raise TraceError(f"{path}: the engine's dtype is {engine.dtype!r}; write one of {', '.join(RUNGS)}")
    if not 0 < engine.n_layers <= 1 << 16:
        raise TraceError(f"{path}: the engine has {engine.n_layers} layers")
    if stray := [name for name in OF_AUDITS if getattr(engine, name) != getattr(_NOTHING_STATED, name)]:
        raise TraceError(f"{path}: the engine has {stray[0]!r}, which only audits of kvdrift write; leave it out")
    _check_entries(path, manifest)
    recorded = {Site(record.site) for entry in manifest.traces for record in entry.records}
    facts = without(engine, absent_sites(manifest.absent, path), recorded, path)
    plans = _plan(path, manifest)
    prompts = _prompts(plans, engine.dtype)
    entries = {entry.name: entry for entry in manifest.traces}

    def pairs() -> Iterator[RecordedPair]:
        return _read(directory, entries, plans)

    unproven = sorted({entry.file for entry in manifest.traces if entry.sha256 is None})
    remarks = []
    if unproven:
        text = f"{len(unproven)} files have no checksum in {MANIFEST}, so a change of them would not be noticed"
        remarks.append(("NO_CHECKSUM", text))
    return Recording(
        kind=f"kvdrift traces written by {engine.engine}",
        facts=facts,
        computed_in=engine.dtype,
        prompts=prompts,
        modes=tuple(mode for mode in Mode if any(plan.mode is mode and plan.role is PairRole.PAIR for plan in plans)),
        pairs=pairs,
        n_pairs=len(plans),
        remarks=tuple(remarks),
        command=manifest.command,
        created=manifest.created,
    )


class _Plan(msgspec.Struct, frozen=True):
    """Two traces, by name, that are compared."""

    role: PairRole
    mode: Mode
    prompt: str
    rung: str
    prefill: str
    decode: str
    positions: tuple[int, ...]
    tokens: tuple[int, ...]


def _check_entries(path: Path, manifest: WrittenManifest) -> None:
    names: set[str] = set()
    for entry in manifest.traces:
        where = f"{path}: the trace {entry.name!r}"
        if entry.name in names:
            raise TraceError(f"{where} is listed twice")
        names.add(entry.name)
        if entry.pass_name not in (PREFILL, DECODE, PREFILL_AGAIN):
            raise TraceError(f"{where} has the pass {entry.pass_name!r}; write prefill, decode or prefill_again")
        if entry.rung not in RUNGS:
            raise TraceError(f"{where} has the rung {entry.rung!r}; write one of {', '.join(RUNGS)}")
        if (entry.mode is None) != (entry.pass_name != DECODE) or entry.mode not in (None, *map(str, Mode)):
            raise TraceError(
                f"{where} has the mode {entry.mode!r}; a decode pass is as_designed or kv_aligned, another has none"
            )
        if not entry.tokens or len(entry.tokens) > MAX_POSITION:
            raise TraceError(f"{where} has {len(entry.tokens)} tokens")
        known: set[tuple[object, ...]] = set()
        for record in entry.records:
            _check_record(where, entry, record, manifest.engine.n_layers)
            part = (record.rank, *(record.heads or ()), None, *(record.columns or ()))
            places = {(record.site, record.layer, position, part) for position in record.positions}
            if len(places) < len(record.positions) or places & known:
                layer = "" if record.layer is None else f" of layer {record.layer}"
                raise TraceError(
                    f"{where} records {record.site}{layer} at {record.positions[:3]} twice; if ranks hold a part each, "
                    "say which: rank, with heads or columns"
                )
            known |= places


def _check_record(where: str, entry: WrittenTrace, record: RecordEntry, n_layers: int) -> None:
    if record.site not in Site.__members__.values():
        raise TraceError(f"{where} records the unknown site {record.site!r}; docs/trace-format.md lists the sites")
    if record.layer is not None and not 0 <= record.layer < n_layers:
        raise TraceError(f"{where} records {record.site} of layer {record.layer}, and the engine has {n_layers} layers")
    if not record.positions or not all(0 <= position < len(entry.tokens) for position in record.positions):
        raise TraceError(
            f"{where} records {record.site} at {record.positions[:3]}, outside its {len(entry.tokens)} tokens"
        )
    if record.site in CACHE_SITES and record.layer is None:
        raise TraceError(f"{where} records {record.site} without a layer")


def _plan(path: Path, manifest: WrittenManifest) -> list[_Plan]:
    """Pair every decode pass, and every second prefill, with the prefill of its prompt and rung."""
    groups: dict[tuple[str, str], list[WrittenTrace]] = defaultdict(list)
    for entry in manifest.traces:
        groups[entry.rung, entry.prompt].append(entry)
    plans = []
    for rung, prompt in sorted(groups, key=lambda key: RUNGS.index(key[0])):
        found = groups[rung, prompt]
        prefills = [entry for entry in found if entry.pass_name == PREFILL]
        others = [entry for entry in found if entry.pass_name != PREFILL]
        if len(prefills) > 1 or len({entry.mode for entry in others if entry.mode}) < len(
            [entry for entry in others if entry.mode]
        ):
            raise TraceError(
                f"{path}: {prompt!r} at {rung} has two passes of one kind; a second prefill is prefill_again"
            )
        if not prefills and others:
            raise AlignmentError(
                f"{path}: {prompt!r} at {rung} has the pass {others[0].name!r} and no prefill to compare it with"
            )
        for entry in others:
            mode = Mode(entry.mode) if entry.mode is not None else Mode.AS_DESIGNED
            role = PairRole.PAIR if entry.pass_name == DECODE else PairRole.SELF_NOISE
            positions = _positions(prefills[0], entry)
            plans.append(
                _Plan(
                    role, mode, prompt, rung, prefills[0].name, entry.name, tuple(positions), tuple(prefills[0].tokens)
                )
            )
    return plans


def _positions(prefill: WrittenTrace, entry: WrittenTrace) -> list[int]:
    """The positions at which a pass is compared with prefill."""
    first, second = ({p for record in item.records for p in record.positions} for item in (prefill, entry))
    return compared_positions(first, second, entry.calls) if entry.pass_name == DECODE else sorted(second)


def _prompts(plans: list[_Plan], native: str) -> tuple[Prompt, ...]:
    probed: dict[str, set[int]] = {}
    tokens: dict[str, tuple[int, ...]] = {}
    for plan in plans:
        if plan.role is PairRole.PAIR and plan.rung == native:
            probed.setdefault(plan.prompt, set()).update(plan.positions)
            tokens[plan.prompt] = plan.tokens
    return tuple(Prompt.probed_at(name, tokens[name], sorted(found)) for name, found in probed.items())


def _read(directory: Path, entries: dict[str, WrittenTrace], plans: list[_Plan]) -> Iterator[RecordedPair]:
    current: tuple[str, str] | None = None
    loaded: dict[str, Trace] = {}
    for plan in plans:
        if (plan.rung, plan.prompt) != current:
            current, loaded = (plan.rung, plan.prompt), {}
        for name in (plan.prefill, plan.decode):
            if name not in loaded:
                entry = entries[name]
                loaded[name] = read_trace(directory, _entry(entry), has_checksum=entry.sha256 is not None)
        pair = PassPair(plan.mode, loaded[plan.prefill], loaded[plan.decode], plan.positions)
        yield RecordedPair(plan.role, pair)
        del pair


def _entry(entry: WrittenTrace) -> TraceEntry:
    """Say of a written trace what an audit says of its own."""
    pass_name = DECODE if entry.pass_name == DECODE else PREFILL
    label = entry.mode or ("full" if entry.pass_name == PREFILL else "prompt_alone")
    return TraceEntry(
        name=entry.name,
        file=entry.file,
        sha256=entry.sha256 or "",
        prompt=entry.prompt,
        pass_name=pass_name,
        label=label,
        rung=entry.rung,
        tokens=entry.tokens,
        calls=entry.calls,
        records=entry.records,
        attention=entry.attention,
    )
