"""GRETA StageTrace files: JSON lines with samples, statistics and hashes of the tensors of two phases.

Files of any size are read line by line and sorted by prompt into a temporary folder; one prompt is in memory at a time.
"""

from __future__ import annotations

import struct
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import AlignmentError, TraceError
from kvdrift.trace.readers.greta import records as fields
from kvdrift.trace.readers.greta.files import GretaFile, find_files, ordered, read_facts
from kvdrift.trace.readers.greta.passes import Assembly, Kept, shift_of, tokens_up_to
from kvdrift.trace.readers.greta.records import LogitsRecord, StageRecord
from kvdrift.trace.readers.lines import decode, read_lines
from kvdrift.trace.readers.passes import FACTS, Stated, read_stated
from kvdrift.trace.recording import MAX_POSITION, UNKNOWN_TOKEN, Offset, RecordedPair, Recording
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

_STAGE = msgspec.json.Decoder(StageRecord)
_LOGITS = msgspec.json.Decoder(LogitsRecord)
_LENGTH = struct.Struct("<I")
Group = tuple[str, Mode]


@dataclass(slots=True)
class _FileSurvey:
    """What the first walk over the files has found."""

    spool: Path
    groups: dict[Group, Path] = field(default_factory=dict)
    strange: Counter[str] = field(default_factory=Counter)
    partial: Counter[str] = field(default_factory=Counter)
    n_elements: int = 0
    n_recorded: int = 0
    n_records: int = 0
    unverified: int = 0
    summaries: int = 0
    disorder: list[str] = field(default_factory=list)
    unmarked: int = 0
    layers: set[int] = field(default_factory=set)
    bits: fields.TrailingBits = field(default_factory=fields.TrailingBits)
    positions: dict[tuple[Group, str], dict[int, int]] = field(default_factory=dict)  # of a pass: position -> token id

    def offsets(self) -> Iterator[Offset]:
        """Yield the prompts whose decode holds the tokens of prefill at other positions."""
        for group in self.groups:
            shift = shift_of(*(self.positions.get((group, phase), {}) for phase in ("prefill", "decode")))
            if shift:
                yield Offset(group[1], group[0], min(self.positions[group, "decode"]) - shift, shift)


def open_greta(directory: Path, *, unmarked: Mode = Mode.AS_DESIGNED, only: Mode | None = None) -> Recording:
    """Open a directory of GRETA traces.

    Args:
        directory: holds them, at any depth.
        unmarked: the mode of files that neither their place nor the metadata beside them gives one.
        only: passes over the files of the other mode.

    Raises:
        TraceError: there are none, or one of them is damaged, with file and line.
    """
    files = find_files(directory)
    if not files:
        raise TraceError(f"{directory} holds no .jsonl or .jsonl.gz file; name a directory of GRETA StageTrace files")
    files = [file for file in files if only is None or (file.mode or unmarked) is only]
    if not files:
        raise TraceError(f"{directory} holds no traces of the mode {only}; --mode both judges those that are there")
    facts, stated = read_facts(directory), read_stated(directory)
    facts = _agreed(facts, stated, directory)
    folder = tempfile.TemporaryDirectory(prefix="kvdrift-")
    survey = _FileSurvey(Path(folder.name))
    try:
        for file in ordered(files):
            _read_file(file, survey, unmarked)
        if not survey.groups:
            raise TraceError(f"{directory} holds no stage_trace or stage_logits record of a known point")
    except BaseException:
        folder.cleanup()
        raise

    offsets = tuple(survey.offsets())
    shifts = {(offset.prompt, offset.mode): offset.shift for offset in offsets}

    def pairs() -> Iterator[RecordedPair]:
        for (prompt, mode), path in survey.groups.items():
            yield from Assembly(prompt, mode, _unspool(path), shifts.get((prompt, mode), 0)).pairs()

    return Recording(
        kind=f"GRETA StageTrace records ({survey.n_records} in {len(files)} files)",
        facts=_facts(facts, stated, survey),
        computed_in=facts.get("dtype"),
        plausible=survey.bits.plausible,
        last_layer_known=stated.get("n_layers") is not None,
        prompts=_prompts(survey, shifts),
        modes=tuple(mode for mode in Mode if any(known is mode for _, known in survey.groups)),
        pairs=pairs,
        n_pairs=len(survey.groups),
        remarks=tuple(_remarks(survey, facts.get("dtype"), unmarked)),
        sampled=_sampled(survey),
        offsets=offsets,
        close=folder.cleanup,
    )


def _prompts(survey: _FileSurvey, shifts: Mapping[Group, int]) -> tuple[Prompt, ...]:
    by_prompt: dict[str, dict[int, int]] = defaultdict(dict)
    for (group, phase), positions in survey.positions.items():
        shift = shifts.get(group, 0) if phase == "decode" else 0
        known = by_prompt[group[0]]
        for position, token in positions.items():
            if token != UNKNOWN_TOKEN or position - shift not in known:
                known[position - shift] = token
    return tuple(
        Prompt.probed_at(name, tokens_up_to(known, max(known)), sorted(known)) for name, known in by_prompt.items()
    )


def _agreed(found: Mapping[str, str], stated: Stated, directory: Path) -> dict[str, str]:
    """What the engine's own files say, together with facts.json.

    Raises:
        AlignmentError: they contradict each other.
    """
    facts = dict(found)
    for name in ("dtype", "model", "model_hash", "device"):
        value = stated.get(name)
        if value is not None and facts.setdefault(name, value) != value:
            raise AlignmentError(
                f"the facts disagree: {name} is {facts[name]!r} in the files of the engine and {value!r} in "
                f"{directory / FACTS}; correct the one that is wrong"
            )
    return facts


def _facts(found: Mapping[str, str], stated: Stated, survey: _FileSurvey) -> EngineFacts:
    highest = max(survey.layers, default=0)
    n_layers = stated.get("n_layers")
    if n_layers is not None and n_layers <= highest:
        raise TraceError(f"{FACTS} says {n_layers} layers, and layer {highest} was recorded")
    notes = [f"weights stored as {found['storage']}"] if "storage" in found else []
    unknown = [] if n_layers is not None else [f"number of layers unknown; the highest recorded is {highest}"]
    return msgspec.structs.replace(
        stated.facts,
        engine=stated.get("engine") or "greta",
        model=found.get("model", "unknown"),
        dtype="float32",
        model_hash=found.get("model_hash"),
        device=found.get("device"),
        n_layers=n_layers or highest + 1,
        versions={**({"greta": found["version"]} if "version" in found else {}), **stated.facts.versions},
        notes=(*stated.facts.notes, *notes, *unknown),
    )


def _read_file(file: GretaFile, survey: _FileSurvey, unmarked: Mode) -> None:
    mode = file.mode or unmarked
    survey.unmarked += file.mode is None
    last: tuple[object, int] = (None, -1)
    with _Spool(survey) as spool:
        for number, line in read_lines(file.path):
            where = f"{file.path}:{number}"
            line = fields.quoted(line) if b"nan" in line or b"inf" in line else line
            if file.is_logits:
                spool.add(
                    (file.prompt, mode), _keep_logits(where, decode(file.path, number, line, _LOGITS), file, survey)
                )
                continue
            record = decode(file.path, number, line, _STAGE)
            kept = _keep(where, record, file, survey)
            if kept is None:
                continue
            spool.add((_prompt_of(record, file), mode), kept)
            if kept.layer is not None:
                key = (kept.phase, kept.position)
                if last[0] == key and kept.layer < last[1]:
                    survey.disorder.append(where)
                last = (key, kept.layer)


class _Spool:
    """Appends records to the file of their prompt and mode; the one of the last record stays open."""

    def __init__(self, survey: _FileSurvey) -> None:
        self._survey = survey
        self._group: Group | None = None
        self._file: IO[bytes] | None = None

    def __enter__(self) -> _Spool:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def add(self, group: Group, kept: Kept) -> None:
        """Write one record, and note its position and token."""
        survey = self._survey
        if group != self._group:
            if self._file is not None:
                self._file.close()
            path = survey.groups.setdefault(group, survey.spool / str(len(survey.groups)))
            self._group, self._file = group, path.open("ab")
        assert self._file is not None
        known = survey.positions.setdefault((group, kept.phase), {})
        known[kept.position] = known.get(kept.position, UNKNOWN_TOKEN) if kept.token is None else kept.token
        data = msgspec.msgpack.encode(kept)
        self._file.write(_LENGTH.pack(len(data)) + data)


def _prompt_of(record: StageRecord, file: GretaFile) -> str:
    seed = file.prompt.partition("/")[2]
    name = record.prompt_id or file.prompt.partition("/")[0]
    return f"{name}/{seed}" if seed else name


def _keep(where: str, record: StageRecord, file: GretaFile, survey: _FileSurvey) -> Kept | None:
    """Check one record and take what is needed of it; None if it is of something else."""
    if record.event not in ("stage_trace", "stage_logits"):
        survey.strange[f"event {record.event}"] += 1
        return None
    point = "logits" if record.event == "stage_logits" else record.point or record.tensor
    if point is None:
        raise TraceError(f"{where}: the record has neither `point` nor `tensor`, so it is not known what it holds")
    site = fields.POINTS.get(point)
    if site is None:
        survey.strange[f"point {point}"] += 1
        return None
    phase = record.phase or file.origin
    if phase is None:
        raise TraceError(f"{where}: the record has no `phase`, and the name of its file gives none")
    if phase not in fields.PHASES and not phase.startswith("decode"):
        raise TraceError(f"{where}: the phase is {phase!r}, and must be prefill_last or decode0")
    if record.pos_id is None or not 0 <= record.pos_id < MAX_POSITION:
        raise TraceError(f"{where}: pos_id is {record.pos_id}, and must be a position from 0 up")
    layer = None if site in fields.OUTSIDE else record.layer
    if site not in fields.OUTSIDE and (layer is None or not 0 <= layer < 1 << 16):
        raise TraceError(f"{where}: {point} is of layer {record.layer}, and must be of one from 0 up")
    for name in ("seq_len", "tokens_total", "stride_elems", "sample_n", "hash"):
        value = getattr(record, name)
        if value is not None and not 0 <= value < 1 << 64:
            raise TraceError(f"{where}: {name} is {value}, which it cannot be")
    values, width, is_exact = _values(where, record, site, survey)
    survey.n_records += 1
    if layer is not None:
        survey.layers.add(layer)
    if len(values) < width:
        survey.partial[point] += 1
    survey.n_recorded += len(values)
    survey.n_elements += width
    return Kept(
        where,
        fields.PHASES.get(phase, "decode"),
        file.origin,
        point,
        str(site),
        layer,
        record.pos_id,
        record.token_id,
        record.seq_len,
        record.tokens_total,
        record.hash,
        width,
        is_exact,
        values.tobytes(),
    )


def _values(where: str, record: StageRecord, site: Site, survey: _FileSurvey) -> tuple[NDArray[np.float32], int, bool]:
    """The recorded values, how many elements the tensor has, and whether they are the engine's own bits."""
    sample = record.sample if record.sample is not None else []
    if record.event == "stage_logits" and not sample:
        sample = record.summary()
        survey.summaries += bool(sample)
        if not sample:
            raise TraceError(f"{where}: a logits record without its figures ({', '.join(fields.SUMMARY)})")
        return _floats(where, sample), len(sample), False
    if not sample:
        raise TraceError(f"{where}: the record has no sample, so there is nothing to compare")
    if record.sample_n is not None and record.sample_n != len(sample):
        raise TraceError(f"{where}: sample_n is {record.sample_n}, and the sample has {len(sample)} values")
    if record.stride_elems is not None and record.stride_elems < len(sample):
        raise TraceError(f"{where}: the sample has {len(sample)} values of a tensor of {record.stride_elems}")
    values = _floats(where, sample)
    width = record.stride_elems or record.vocab or len(sample)
    is_exact = fields.is_exact(sample)
    exact = None if record.hash is None else fields.recovered(values, record.hash)
    if exact is not None or is_exact:
        survey.bits.add(site, values if exact is None else exact)
    if exact is not None:
        return exact, width, is_exact or len(values) <= fields.HASHED
    covers = record.hash is not None and len(values) >= min(fields.HASHED, width)
    if covers and is_exact and np.isfinite(values).all():
        raise TraceError(
            f"{where}: the record contradicts itself: its sample has the hash {fields.fnv1a(values)}, and it says "
            f"{record.hash}"
        )
    survey.unverified += not is_exact
    return values, width, is_exact


def _floats(where: str, sample: list[fields.Number]) -> NDArray[np.float32]:
    try:
        return fields.floats(sample)
    except ValueError as error:
        raise TraceError(f"{where}: a value is not a number: {error}") from error


def _keep_logits(where: str, record: LogitsRecord, file: GretaFile, survey: _FileSurvey) -> Kept:
    if not 0 <= record.token_idx < MAX_POSITION or not record.logits:
        raise TraceError(f"{where}: token_idx is {record.token_idx}, with {len(record.logits)} logits")
    if file.origin is None:
        raise TraceError(f"{where}: logits of no known pass; put the dump into a folder named prefill or decode")
    values = _floats(where, record.logits)
    any_exact = fields.is_exact(record.logits)
    survey.unverified += not any_exact
    survey.n_records += 1
    survey.n_recorded += len(values)
    survey.n_elements += len(values)
    return Kept(
        where,
        file.origin,
        file.origin,
        "logits_dump",
        str(Site.LOGITS),
        None,
        record.token_idx,
        record.token_id,
        None,
        None,
        None,
        len(values),
        any_exact,
        values.tobytes(),
    )


def _unspool(path: Path) -> list[Kept]:
    decoder = msgspec.msgpack.Decoder(Kept)
    kept = []
    with path.open("rb") as spool:
        while header := spool.read(_LENGTH.size):
            kept.append(decoder.decode(spool.read(_LENGTH.unpack(header)[0])))
    return kept


def _remarks(survey: _FileSurvey, computed_in: str | None, unmarked: Mode) -> Iterator[tuple[str, str]]:
    if survey.partial:
        share = 100.0 * survey.n_recorded / max(1, survey.n_elements)
        yield "SAMPLED", f"{share:.3g} % of the elements were recorded, a sample from the front of each tensor"
    if survey.unverified:
        yield (
            "DIGITS",
            f"{survey.unverified} of {survey.n_records} samples are printed with too few digits for their hashes to be "
            "checked; where the digits of a pair agree and the hashes do not, the pair counts as different by 5e-6",
        )
    if computed_in is None:
        yield (
            "DTYPE_UNKNOWN",
            f"no config.json, metadata.json or facts.json names the dtype that the engine computes in; {survey.bits}",
        )
    if survey.summaries:
        yield "LOGITS_SUMMARY", f"{survey.summaries} logits records hold five figures and a hash instead of the logits"
    if survey.disorder:
        where = survey.disorder[0]
        yield "LAYER_ORDER", f"{len(survey.disorder)} records come after one of a higher layer; first: {where}"
    if survey.strange:
        some = ", ".join(f"{name} ({n})" for name, n in survey.strange.most_common(5))
        yield "PASSED_OVER", f"{survey.strange.total()} records are of something that is not a site: {some}"
    if survey.unmarked:
        yield "MODE_UNMARKED", f"{survey.unmarked} files do not say their mode and were taken as {unmarked}"


def _sampled(survey: _FileSurvey) -> str | None:
    """What is missing where a part of each tensor was recorded, and what would settle it; None if nothing is."""
    if not survey.partial:
        return None
    return (
        f"{survey.partial.total()} of {survey.n_records} records hold a part of their tensor ({survey.n_recorded} of "
        f"{survey.n_elements} elements in all), and the rest may differ; record with GRETA_TRACE_STAGE_SAMPLE at the "
        "width of the widest tensor"
    )
