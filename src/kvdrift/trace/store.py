"""Traces on disk: one safetensors file a pass, one manifest.json for all.

The manifest carries the SHA-256 of every file, so that a damaged or edited trace is an error and never a verdict.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import ml_dtypes
import msgspec
import numpy as np
import safetensors
from safetensors.numpy import save

from kvdrift.errors import TraceError
from kvdrift.plan import Mode
from kvdrift.sites import Site
from kvdrift.trace.manifest import (
    FORMAT_VERSION,
    AttentionEntry,
    CallEntry,
    Manifest,
    PairEntry,
    RecordEntry,
    TraceEntry,
)
from kvdrift.trace.model import Array, AttentionSpec, CacheRecord, Call, PassPair, RowRecord, Trace

MANIFEST = "manifest.json"

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


@dataclass(slots=True)
class TraceStore:
    """Writes traces into a directory as they are recorded; `finish` writes the manifest that makes them a run."""

    directory: Path
    _traces: dict[int, TraceEntry] = field(default_factory=dict)
    _kept: list[Trace] = field(default_factory=list)
    _pairs: list[PairEntry] = field(default_factory=list)
    _prompts: dict[str, str] = field(default_factory=dict)

    def add(self, pair: PassPair, role: str) -> None:
        """Write both traces of a pair, unless one was written with an earlier pair."""
        prefill, decode = self._entry(pair.prefill), self._entry(pair.decode)
        self._pairs.append(
            PairEntry(
                role=role,
                mode=str(pair.mode),
                prompt=pair.prefill.prompt,
                rung=pair.prefill.rung,
                prefill=prefill.name,
                decode=decode.name,
                positions=list(pair.positions),
            )
        )

    def forget(self) -> None:
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
        name = f"{folder}/{trace.rung}/{trace.pass_name}.{trace.label}"
        tensors: dict[str, Array] = {}
        records = [_row_entry(index, row, tensors) for index, row in enumerate(trace.rows)]
        records += [_cache_entry(index, read, tensors) for index, read in enumerate(trace.cache)]
        path = self.directory / f"{name}.safetensors"
        path.parent.mkdir(parents=True, exist_ok=True)
        data = save({name: np.ascontiguousarray(array) for name, array in tensors.items()})
        path.write_bytes(data)
        return TraceEntry(
            name=name,
            file=f"{name}.safetensors",
            sha256=hashlib.sha256(data).hexdigest(),
            prompt=trace.prompt,
            pass_name=trace.pass_name,
            label=trace.label,
            rung=trace.rung,
            tokens=list(trace.tokens),
            calls=[CallEntry(**{**asdict(call), "kernels": list(call.kernels)}) for call in trace.calls],
            records=records,
            attention=[
                AttentionEntry(
                    layer, spec.scale, spec.softcap, spec.window, None if spec.sinks is None else [*spec.sinks]
                )
                for layer, spec in sorted(trace.attention.items())
            ],
        )


def read_manifest(directory: Path) -> Manifest:
    """Return the manifest of a trace directory.

    Raises:
        TraceError: it is missing, damaged, of another version, or holds something that a manifest may not hold.
    """
    path = directory / MANIFEST
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(
            f"no readable {MANIFEST} in {directory} ({error.strerror}); name a run that kept its traces"
        ) from error
    try:
        version = msgspec.json.decode(data, type=dict[str, object]).get("format_version")
        if version != FORMAT_VERSION:
            raise TraceError(f"{path} has format version {version}, and this kvdrift reads {FORMAT_VERSION}")
        return msgspec.json.decode(data, type=Manifest)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise TraceError(f"{path} is damaged or is no trace manifest: {error}") from error


def read_pairs(directory: Path, manifest: Manifest) -> Iterator[tuple[PairEntry, PassPair]]:
    """Yield the pairs of a run in the order in which they were recorded, one prompt's traces in memory at a time."""
    entries = {entry.name: entry for entry in manifest.traces}
    if len(entries) != len(manifest.traces):
        raise TraceError(f"{directory / MANIFEST} lists two traces of one name")
    loaded: dict[str, Trace] = {}
    current: tuple[str, str] | None = None
    for pair in manifest.pairs:
        if (pair.prompt, pair.rung) != current:
            loaded.clear()
            current = (pair.prompt, pair.rung)
        for name in (pair.prefill, pair.decode):
            if name not in entries:
                raise TraceError(f"{directory / MANIFEST} pairs a trace {name!r} that it does not list")
            if name not in loaded:
                loaded[name] = _read_trace(directory, entries[name])
        yield (
            pair,
            PassPair(Mode(pair.mode), loaded[pair.prefill], loaded[pair.decode], tuple(pair.positions)),
        )


def _read_trace(directory: Path, entry: TraceEntry) -> Trace:
    path = directory / entry.file
    if not path.resolve().is_relative_to(directory.resolve()):
        raise TraceError(f"{directory / MANIFEST} names a file outside its directory: {entry.file!r}")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"cannot read the trace {path}: {error.strerror}") from error
    if hashlib.sha256(data).hexdigest() != entry.sha256:
        raise TraceError(
            f"the trace {path} ({len(data)} bytes) does not match its checksum: it is truncated or was changed after "
            "it was recorded. Record the run again."
        )
    tensors = _deserialise(path, data)
    listed = {name for r in entry.records for name in (r.tensor, r.slots, r.stored) if name is not None}
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
    )
    trace.calls.extend(
        Call(c.start, c.q_len, c.cache_len_before, c.kv_len, c.attention, tuple(c.kernels)) for c in entry.calls
    )
    for spec in entry.attention:
        sinks = None if spec.sinks is None else tuple(spec.sinks)
        trace.add_attention(spec.layer, AttentionSpec(spec.scale, spec.softcap, spec.window, sinks))
    try:
        for record in entry.records:
            site, positions, values = Site(record.site), tuple(record.positions), tensors[record.tensor]
            slots = None if record.slots is None else tensors[record.slots].astype(np.int64)
            if record.stored is None:
                trace.rows.append(RowRecord(record.layer, site, positions, values, slots))
            elif slots is None or record.layer is None:
                raise TraceError(f"the trace {path} has a cache record without slots or layer: {record.tensor}")
            else:
                stored = tensors[record.stored].astype(np.int64)
                trace.cache.append(CacheRecord(record.layer, site, positions, slots, stored, values))
    except (KeyError, ValueError) as error:
        raise TraceError(f"the trace {path} lacks or misnames something that its manifest lists: {error}") from error
    return trace


def _row_entry(index: int, row: RowRecord, tensors: dict[str, Array]) -> RecordEntry:
    name = f"{index}.{row.site}"
    tensors[name] = row.values
    slots = None
    if row.slots is not None:
        slots = f"{name}.slots"
        tensors[slots] = row.slots
    return RecordEntry(tensor=name, site=str(row.site), layer=row.layer, positions=list(row.positions), slots=slots)


def _cache_entry(index: int, read: CacheRecord, tensors: dict[str, Array]) -> RecordEntry:
    name = f"cache.{index}.{read.site}"
    tensors |= {name: read.rows, f"{name}.slots": read.slots, f"{name}.stored": read.stored.astype(np.int64)}
    return RecordEntry(
        tensor=name,
        site=str(read.site),
        layer=read.layer,
        positions=list(read.positions),
        slots=f"{name}.slots",
        stored=f"{name}.stored",
    )


def _deserialise(path: Path, data: bytes) -> dict[str, Array]:
    try:
        found = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        raise TraceError(f"the trace {path} is no readable safetensors file: {error}") from error
    tensors: dict[str, Array] = {}
    for name, view in found:
        dtype = _DTYPES.get(view["dtype"])
        if dtype is None:
            raise TraceError(f"the trace {path} holds {name!r} in the unknown dtype {view['dtype']}")
        tensors[name] = np.frombuffer(bytearray(view["data"]), dtype=dtype).reshape(view["shape"])
    return tensors
