"""Traces on disk: one safetensors file a pass, one manifest.json for all.

The manifest carries the SHA-256 of every file, so that a damaged or edited trace is an error and never a verdict.
"""

from __future__ import annotations

import hashlib
import math
import mmap
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import ml_dtypes
import msgspec
import numpy as np

from kvdrift.errors import TraceError, UsageError
from kvdrift.trace.manifest import (
    FORMAT_VERSION,
    LayerAttention,
    Manifest,
    PairEntry,
    ProductEntry,
    RecordEntry,
    TraceEntry,
)
from kvdrift.trace.mapped import Pages, map_file, sha256_of
from kvdrift.trace.model import Array, CacheRecord, PassPair, ProductRecord, RowRecord, Slots, Trace
from kvdrift.trace.parts import Piece, join, part_of
from kvdrift.trace.ranks import RankPart
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.sites import CACHE_SITES, Site

MANIFEST = "manifest.json"
_MOST_SLOTS = 1 << 24  # a key position above this is a damaged file, and would fill the memory

# safetensors' own names of the dtypes, and numpy's
_DTYPES: dict[str, np.dtype[np.generic]] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
}
# What columns of tokens, lengths and masks may have besides; values of a model never do.
COLUMN_DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype(np.bool_),
    **{f"{kind}{bits}": np.dtype(f"{kind.lower()}{bits // 8}") for kind in "UI" for bits in (8, 16, 32, 64)},
}

_SITES = {site.value: site for site in Site}  # Site(name) takes its time, and a trace names thousands

DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

# What every manifest of version 1 states of the engine and of the plan.
_FACTS = (
    "model_hash",
    "device",
    "attention",
    "cache",
    "vocab_size",
    "max_positions",
    "parameters",
    "can_rewind",
    "why_no_rewind",
    "sites",
    "notes",
    "versions",
)
_OPTIONS = ("mode", "span", "layers", "alpha", "seed")


class _Stated(msgspec.Struct):
    """The parts of a manifest of which every field must be there."""

    engine: dict[str, object]
    plan: dict[str, object]


_Struct = TypeVar("_Struct", bound=msgspec.Struct)


@dataclass(slots=True)
class TraceStore:
    """Writes traces into a directory as they are recorded; `finish` writes the manifest that makes them a run."""

    directory: Path
    _traces: dict[int, TraceEntry] = field(default_factory=dict)
    _kept: list[Trace] = field(default_factory=list)
    _pairs: list[PairEntry] = field(default_factory=list)
    _prompts: dict[str, str] = field(default_factory=dict)
    _names: set[str] = field(default_factory=set)

    def add(self, item: RecordedPair) -> None:
        """Write both traces of a pair, unless one was written with an earlier pair."""
        pair = item.pair
        prefill, decode = self._entry(pair.prefill), self._entry(pair.decode)
        self._pairs.append(
            PairEntry(
                role=item.role,
                mode=pair.mode,
                prompt=pair.decode.prompt,
                rung=pair.prefill.rung,
                prefill=prefill.name,
                decode=decode.name,
                positions=list(pair.positions),
                scenario=item.scenario,
                shift=item.shift,
            )
        )

    def release(self) -> None:
        """Let go of the traces written so far; no later pair refers to them."""
        self._kept.clear()
        self._traces = {-1 - i: entry for i, entry in enumerate(self._traces.values())}

    def finish(self, manifest: Manifest) -> None:
        """Write the manifest, last."""
        full = msgspec.structs.replace(manifest, traces=list(self._traces.values()), pairs=self._pairs)
        (self.directory / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(full), indent=1))

    def _entry(self, trace: Trace) -> TraceEntry:
        found = self._traces.get(id(trace))
        if found is None:
            found = self._write(trace)
            self._traces[id(trace)] = found
            self._kept.append(trace)  # keeps the id from being used again
        return found

    def _write(self, trace: Trace) -> TraceEntry:
        folder = self._prompts.setdefault(trace.prompt, f"{len(self._prompts):03d}")
        name = base = f"{folder}/{trace.rung}/{trace.pass_name}.{trace.label}"
        n = 1
        while name in self._names:  # every fault of the positive control has a decode step of its own
            n += 1
            name = f"{base}.{n}"
        self._names.add(name)
        return write_trace(self.directory, name, trace)


def write_trace(directory: Path, name: str, trace: Trace) -> TraceEntry:
    """Write the tensors of a trace to `name`.safetensors in `directory` and return what a manifest says of it."""
    tensors: dict[str, Array] = {}
    records = [_row_entry(index, row, tensors) for index, row in enumerate(trace.rows)]
    records += [_cache_entry(index, read, tensors) for index, read in enumerate(trace.cache)]
    exact = (item for item in trace.products if item.reference is not None or item.note is not None)
    products = [_product_entry(index, item, tensors) for index, item in enumerate(exact)]
    path = directory / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    digest = _write(path, tensors)
    return TraceEntry(
        name=name,
        file=f"{name}.safetensors",
        sha256=digest,
        prompt=trace.prompt,
        pass_name=trace.pass_name,
        label=trace.label,
        rung=trace.rung,
        tokens=list(trace.tokens),
        calls=list(trace.calls),
        records=records,
        attention=[LayerAttention.of(layer, spec) for layer, spec in sorted(trace.attention.items())],
        products=products,
    )


def _write(path: Path, tensors: Mapping[str, Array]) -> str:
    """Write a safetensors file and return its SHA-256, one tensor at a time.

    safetensors' own `save` makes the file in memory first, twice, and its `save_file` one that nobody else may read.
    """
    start, header = 0, {}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # aligned, the widest first
    for name, array in ordered:
        header[name] = {
            "dtype": DTYPE_NAMES[array.dtype],
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        head = len(text).to_bytes(8, "little") + text
        digest.update(head)
        file.write(head)
        for _, array in ordered:
            data = _bytes_of(array)
            digest.update(data)
            file.write(data)
    return digest.hexdigest()


def _bytes_of(array: Array) -> memoryview:
    """The bytes of an array in row order, little-endian as the format has it."""
    array = np.ascontiguousarray(array)
    if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
        array = array.byteswap()
    return array.reshape(-1).view(np.uint8).data


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a trace directory.

    Raises:
        TraceError: it is missing, damaged, of another version, or holds something that a manifest may not hold.
    """
    path = directory / MANIFEST
    manifest = read_json(path, Manifest, FORMAT_VERSION)
    # An audit writes every fact and option; what was taken out must not be filled in with a default.
    data = msgspec.json.decode(path.read_bytes(), type=_Stated)
    for name, found, required in (("engine", data.engine, _FACTS), ("plan", data.plan, _OPTIONS)):
        if missing := [field for field in required if field not in found]:
            raise TraceError(f"{path} is damaged: object missing required field `{missing[0]}` - at `$.{name}`")
    return manifest


class _Version(msgspec.Struct):
    """What every manifest begins with; the rest is skipped."""

    format_version: object = None


def read_json(path: Path, kind: type[_Struct], known_version: int) -> _Struct:
    """Return a manifest of some kind, checked against that kind and against the version that this kvdrift reads.

    Raises:
        TraceError: as `read_manifest`.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(
            f"no readable {path.name} in {path.parent} ({error.strerror}); name a run that kept its traces"
        ) from error
    try:
        version = msgspec.json.decode(data, type=_Version).format_version
        if version != known_version:
            raise TraceError(f"{path} has format version {version}, and this kvdrift reads {known_version}")
        return msgspec.json.decode(data, type=kind)
    except UsageError as error:  # an option of the plan that no audit can have
        raise TraceError(f"the traces in {path.parent} are not consistent: {error}; record the run again") from error
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} is damaged or is not a trace manifest: {error}") from error


def read_pairs(directory: Path, manifest: Manifest) -> Iterator[tuple[PairEntry, PassPair]]:
    """Yield the pairs of a run in the order in which they were recorded, one prompt's traces in memory at a time."""
    entries = {entry.name: entry for entry in manifest.traces}
    if len(entries) != len(manifest.traces):
        raise TraceError(f"{directory / MANIFEST} lists two traces of one name")
    loaded: dict[str, Trace] = {}
    current: tuple[str, str] | None = None
    for pair in manifest.pairs:
        # Scenarios share prefills over the whole rung, and each decode trace of theirs is read once.
        group = (pair.prompt if pair.scenario is None else "", pair.rung)
        if group != current:
            loaded.clear()
            current = group
        for name in (pair.prefill, pair.decode):
            if name not in entries:
                raise TraceError(f"{directory / MANIFEST} pairs a trace {name!r} that it does not list")
            if name not in loaded:
                loaded[name] = read_trace(directory, entries[name])
        yield (
            pair,
            PassPair(pair.mode, loaded[pair.prefill], loaded[pair.decode], tuple(pair.positions)),
        )
        if pair.scenario is not None:
            del loaded[pair.decode]


def read_trace(directory: Path, entry: TraceEntry, *, has_checksum: bool = True) -> Trace:
    """Return one trace of a directory, every tensor of its file checked against what the manifest lists.

    Values lie in the file, which is mapped, and not in memory. `has_checksum` says whether the manifest has one.

    Raises:
        TraceError: the file is missing, damaged, lies outside the directory, or is not what the manifest says.
    """
    path = directory / entry.file
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TraceError(f"{directory / MANIFEST} names a file outside its directory: {entry.file!r}")
    pages = _mapped(path, entry.sha256 if has_checksum else None)
    tensors = _deserialise(path, pages.data)
    listed = {name for r in entry.records for name in (r.tensor, r.slots, r.stored) if name is not None}
    listed |= {name for p in entry.products for name in (p.reference, p.spread, p.values) if name is not None}
    if unlisted := sorted(tensors.keys() - listed):  # taken out of the manifest, a value would not be compared
        raise TraceError(f"the trace {path} holds {unlisted[0]!r}, which {MANIFEST} does not list")
    if entry.pass_name not in ("prefill", "decode"):
        raise TraceError(f"{directory / MANIFEST} names an unknown pass {entry.pass_name!r}")
    trace = Trace(
        entry.prompt,
        "prefill" if entry.pass_name == "prefill" else "decode",
        entry.label,
        entry.rung,
        tuple(entry.tokens),
        pages=pages,
    )
    trace.calls.extend(entry.calls)
    for layer in entry.attention:
        trace.add_attention(layer.layer, layer.spec)
    pieces: list[Piece] = []
    try:
        for record in entry.records:
            site, positions, values = _SITES[record.site], tuple(record.positions), tensors[record.tensor]
            slots = None if record.slots is None else tensors[record.slots].astype(np.int64, copy=False)
            if (part := part_of(record)) is not None:
                pieces.append(Piece(record.layer, site, positions, part, values, slots))
                if site not in CACHE_SITES:
                    _check_rows(path, record, values, slots)
            elif record.stored is None and site in CACHE_SITES:
                trace.cache.append(_whole_read(path, record, values, slots))
            elif record.stored is None:
                _check_rows(path, record, values, slots)
                trace.rows.append(RowRecord(record.layer, site, positions, values, slots))
            elif slots is None or record.layer is None:
                raise TraceError(f"the trace {path} has a cache record without slots or layer: {record.tensor}")
            else:
                stored = tensors[record.stored].astype(np.int64, copy=False)
                trace.cache.append(CacheRecord(record.layer, site, positions, slots, stored, values))
        trace.products.extend(_product(path, product, tensors) for product in entry.products)
    except (KeyError, ValueError) as error:
        raise TraceError(f"the trace {path} lacks or misnames something that its manifest lists: {error}") from error
    join(pieces, trace, path)
    return trace


def _mapped(path: Path, checksum: str | None) -> Pages:
    try:
        if checksum is not None and sha256_of(path) != checksum:
            raise TraceError(
                f"the trace {path} ({path.stat().st_size} bytes) does not match its checksum: it is truncated or was "
                "changed after it was recorded. Record the run again."
            )
        return map_file(path)
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error


def _whole_read(path: Path, record: RecordEntry, values: Array, slots: Slots | None) -> CacheRecord:
    """A cache read of which every row is in the file, as other programs write it; slots are 0, 1, 2 ... by default."""
    slots = np.arange(len(values)) if slots is None else slots
    if record.layer is None or values.ndim != 3 or slots.shape != values.shape[:1] or len(record.positions) != 1:
        raise TraceError(
            f"the trace {path} holds {record.tensor!r} as {list(values.shape)} for {record.site} at the positions "
            f"{record.positions}; a cache read is [slot, head, dim] of one layer at one position"
        )
    return CacheRecord(record.layer, Site(record.site), tuple(record.positions), slots, np.arange(len(slots)), values)


def _check_rows(path: Path, record: RecordEntry, values: Array, slots: Slots | None) -> None:
    keys_fit = slots is None or (
        values.ndim == 3
        and slots.shape == values.shape[2:]
        and (slots.size == 0 or (int(slots.min()) >= 0 and int(slots.max()) < _MOST_SLOTS))
    )
    if values.ndim == 0 or len(values) != len(record.positions) or not keys_fit:
        raise TraceError(
            f"the trace {path} holds {record.tensor!r} as {list(values.shape)}, which does not fit its "
            f"{len(record.positions)} positions" + ("" if slots is None else f" and {slots.size} key slots")
        )


def _product(path: Path, entry: ProductEntry, tensors: Mapping[str, Array]) -> ProductRecord:
    """The product of an entry, its tensors checked against each other."""
    site, positions = _SITES[entry.site], tuple(entry.positions)
    if entry.reference is None or entry.spread is None:
        return ProductRecord(entry.layer, site, entry.name, positions, note=entry.note)
    reference, spread = tensors[entry.reference], tensors[entry.spread]
    values = None if entry.values is None else tensors[entry.values]
    shapes = {reference.shape, spread.shape} | (set() if values is None else {values.shape})
    if len(shapes) > 1 or reference.ndim != 2 or len(reference) != len(entry.positions):
        raise TraceError(
            f"the trace {path} holds the product {entry.name!r} as {[list(shape) for shape in shapes]} for "
            f"{len(entry.positions)} positions; all of it is [position, feature]"
        )
    return ProductRecord(entry.layer, site, entry.name, positions, values, reference, spread, entry.note)


def _row_entry(index: int, row: RowRecord, tensors: dict[str, Array]) -> RecordEntry:
    name = f"{index}.{row.site}"
    tensors[name] = row.values
    slots = None
    if row.slots is not None:
        slots = f"{name}.slots"
        tensors[slots] = row.slots
    return _with_part(
        RecordEntry(tensor=name, site=str(row.site), layer=row.layer, positions=list(row.positions), slots=slots),
        row.part,
    )


def _with_part(entry: RecordEntry, part: RankPart | None) -> RecordEntry:
    if part is None:
        return entry
    spans = {} if part.span is None else {part.axis: list(part.span)}
    return msgspec.structs.replace(entry, rank=part.rank, **spans)


def _cache_entry(index: int, read: CacheRecord, tensors: dict[str, Array]) -> RecordEntry:
    name = f"cache.{index}.{read.site}"
    if read.part is not None:
        tensors |= {name: read.rows, f"{name}.slots": read.slots}
        entry = RecordEntry(
            tensor=name, site=str(read.site), layer=read.layer, positions=list(read.positions), slots=f"{name}.slots"
        )
        return _with_part(entry, read.part)
    tensors |= {name: read.rows, f"{name}.slots": read.slots, f"{name}.stored": read.stored.astype(np.int64)}
    return RecordEntry(
        tensor=name,
        site=str(read.site),
        layer=read.layer,
        positions=list(read.positions),
        slots=f"{name}.slots",
        stored=f"{name}.stored",
    )


def _product_entry(index: int, item: ProductRecord, tensors: dict[str, Array]) -> ProductEntry:
    names: dict[str, str] = {}
    for kind in ("reference", "spread", "values"):
        array: Array | None = getattr(item, kind)
        if item.reference is not None and array is not None:
            names[kind] = f"product.{index}.{kind}"
            tensors[names[kind]] = array
    return ProductEntry(
        site=str(item.site), layer=item.layer, name=item.name, positions=list(item.positions), note=item.note, **names
    )


def read_tensors(path: Path, more: Mapping[str, np.dtype[np.generic]] = MappingProxyType({})) -> dict[str, Array]:
    """Return the tensors of a safetensors file by name; `more` are dtypes that it may have besides those of traces.

    Raises:
        TraceError: it is missing or damaged.
    """
    try:
        return _deserialise(path, path.read_bytes(), {**_DTYPES, **more})
    except OSError as error:
        raise TraceError(f"cannot read {path}: {error.strerror}") from error


class _View(msgspec.Struct):
    """What the header of a safetensors file says of one tensor; all None for its `__metadata__`."""

    dtype: str | None = None
    shape: tuple[int, ...] | None = None
    data_offsets: tuple[int, int] | None = None


def _deserialise(
    path: Path, data: bytes | mmap.mmap, dtypes: Mapping[str, np.dtype[np.generic]] = MappingProxyType(_DTYPES)
) -> dict[str, Array]:
    """Return the tensors of a safetensors file by name, as views of its bytes.

    The header is read here and not by safetensors' own `deserialize`, which copies every tensor: with as many small
    tensors as a trace has, that was a tenth of all judging.

    Raises:
        TraceError: the file is damaged, or its tensors overlap or leave gaps.
    """
    start, size = 8 + int.from_bytes(data[:8], "little"), len(data)
    try:
        header = msgspec.json.decode(memoryview(data)[8:start], type=dict[str, _View])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise TraceError(f"the trace {path} is not a readable safetensors file: {error}") from error
    header.pop("__metadata__", None)
    tensors: dict[str, Array] = {}
    spans: list[tuple[int, int]] = []
    for name, view in header.items():
        if view.dtype is None or view.shape is None or view.data_offsets is None:
            raise TraceError(f"the trace {path} is not a readable safetensors file: {name!r} has no dtype or place")
        dtype = dtypes.get(view.dtype)
        if dtype is None:
            raise TraceError(f"the trace {path} holds {name!r} in the unknown dtype {view.dtype}")
        begin, end = view.data_offsets
        n_bytes = math.prod(view.shape) * dtype.itemsize
        if begin < 0 or end - begin != n_bytes or start + end > size or (view.shape and min(view.shape) < 0):
            raise TraceError(f"the trace {path} is not a readable safetensors file: {name!r} does not fit its place")
        spans.append((begin, end))
        tensors[name] = np.ndarray(view.shape, dtype, data, start + begin)
    spans.sort()
    ends = [0, *(end for _, end in spans)]
    if start > size or [begin for begin, _ in spans] != ends[:-1] or start + ends[-1] != size:
        raise TraceError(f"the trace {path} is not a readable safetensors file: its tensors overlap or leave gaps")
    return tensors
