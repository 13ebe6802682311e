"""Folders of .npz or .npy files, named by a rule; docs/trace-format.md has it.

`PROMPT.prefill.npz` holds one pass, or the folder `PROMPT.prefill` holds its arrays as .npy files. An array is named
`SITE`, `SITE.LAYER` or, for what attention read, `k_cache.LAYER.POSITION`; `slots.LAYER.POSITION` names the positions
of its rows.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np

from kvdrift.errors import TraceError
from kvdrift.trace.manifest import RecordEntry
from kvdrift.trace.model import Trace
from kvdrift.trace.parts import Piece, join, part_of
from kvdrift.trace.ranks import RankPart
from kvdrift.trace.readers.passes import LoadedPass, PassFiles, parse_name, read_stated, recording_of
from kvdrift.trace.recording import MAX_POSITION, Recording, files_under, inside
from kvdrift.vocabulary.facts import AttentionSpec, Call
from kvdrift.vocabulary.sites import AFTER_LAYERS, ATTENTION_ROW_SITES, BEFORE_LAYERS, CACHE_SITES, Site

_FLOATS = ("float64", "float32", "float16", "bfloat16")
# A part of a tensor at the end of a name: whose it is, and which heads or columns it holds, [first, stop).
_PART = re.compile(
    r"(?P<whole>.+?)(?=\.(?:rank|heads|columns)\d)(?:\.rank(?P<rank>\d{1,8}))?"
    r"(?:\.(?P<axis>heads|columns)(?P<first>\d{1,8})-(?P<stop>\d{1,8}))?"
)
_SPEC, _WINDOW, _SLOTS = "attention_scale", "attention_window", "slots"
Array = np.ndarray[Any, Any]


class _Named(NamedTuple):
    """An array, and what its name says; `part` is None of a whole tensor."""

    name: str
    site: Site
    layer: int | None
    position: int | None
    part: RankPart | None = None


def is_npz(directory: Path) -> bool:
    """Whether a directory holds .npz or .npy files."""
    return bool(files_under(directory, ".npz", ".npy"))


def open_npz(directory: Path) -> Recording:
    """Open a directory of .npz files, or of folders of .npy files.

    Raises:
        TraceError: there are none, one is damaged or holds objects, or a name does not follow the rule.
    """
    passes = []
    for path in files_under(directory, ".npz"):
        prompt, kind, mode = parse_name(path, path.name.removesuffix(".npz"))
        passes.append(PassFiles(path, prompt, kind, mode, _loader(path, partial(_members, path), prompt, kind)))
    for folder in sorted({path.parent for path in files_under(directory, ".npy")}):
        prompt, kind, mode = parse_name(folder, folder.name)
        passes.append(
            PassFiles(folder, prompt, kind, mode, _loader(folder, partial(_files, directory, folder), prompt, kind))
        )
    if not passes:
        raise TraceError(f"{directory} holds no .npz and no .npy file")
    return recording_of(f"numpy files of {len(passes)} passes", "unknown", passes, read_stated(directory))


def _loader(
    where: Path, arrays: Callable[[], Iterator[tuple[str, Array]]], prompt: str, kind: str
) -> Callable[[tuple[int, ...] | None], LoadedPass]:
    def load(tokens: tuple[int, ...] | None) -> LoadedPass:
        return _trace(where, dict(arrays()), prompt, kind, tokens)

    return load


def _trace(where: Path, arrays: dict[str, Array], prompt: str, kind: str, tokens: tuple[int, ...] | None) -> LoadedPass:
    ids = _integers(where, arrays, "tokens")
    if ids is None:
        raise TraceError(f"{where} has no array `tokens`: the token ids of the whole sequence")
    positions = _integers(where, arrays, "positions")
    if positions is None:
        raise TraceError(f"{where} has no array `positions`: the positions of the rows of the other arrays")
    if len(set(positions)) < len(positions) or not all(0 <= p < min(len(ids), MAX_POSITION) for p in positions):
        raise TraceError(
            f"{where}: the positions {positions[:5]} are not among the {len(ids)} tokens, or are there twice"
        )
    floats = [array.dtype.name for array in arrays.values() if array.dtype.name in _FLOATS]
    rung = max(floats, key=floats.count, default="float32")
    trace = Trace(prompt, "decode" if kind == "decode" else "prefill", kind, rung, tuple(ids))
    scales: dict[int, float] = {}
    windows: dict[int, int] = {}
    slots = _slots(where, arrays)
    strange = []
    pieces: list[Piece] = []
    for name, array in arrays.items():
        whole, part = _part(where, name)
        site, layer, position = _place(whole)
        if site == _SPEC and layer is not None:
            scales[layer] = float(array.reshape(-1)[0])
        elif site == _WINDOW and layer is not None:
            windows[layer] = int(array.reshape(-1)[0])
        elif site == _SLOTS and layer is not None and position is not None:
            continue
        elif site == "calls":
            trace.calls.extend(_calls(where, array))
        elif site in ("tokens", "positions"):
            continue
        elif site not in Site.__members__.values():
            strange.append(name)
        else:
            place = _Named(name, Site(site), layer, position, part)
            if place.site in CACHE_SITES:
                _add_read(where, trace, place, array, slots, pieces)
            else:
                _add(where, trace, place, positions, array, pieces)
    join(pieces, trace, where)
    for layer, scale in scales.items():
        trace.add_attention(layer, AttentionSpec(scale, window=windows.get(layer)))
    return LoadedPass(trace, strange=tuple(strange))


def _part(where: Path, name: str) -> tuple[str, RankPart | None]:
    """Split what a name says of a part from the rest: `attn_ctx.0.rank1.heads4-8`, `mlp_out.0.rank0`.

    Raises:
        TraceError: the part is named wrongly.
    """
    match = _PART.fullmatch(name)
    if match is None:
        return name, None
    rank = None if match["rank"] is None else int(match["rank"])
    span = None if match["axis"] is None else [int(match["first"]), int(match["stop"])]
    heads, columns = (span if match["axis"] == axis else None for axis in ("heads", "columns"))
    try:
        return match["whole"], part_of(
            RecordEntry(name, match["whole"], None, [], rank=rank, heads=heads, columns=columns)
        )
    except ValueError as error:
        raise TraceError(f"{where}: {error}") from error


def _add(where: Path, trace: Trace, place: _Named, positions: list[int], array: Array, pieces: list[Piece]) -> None:
    name, site, layer, position, part = place
    _check_array(where, place, array)
    keys = np.arange(array.shape[-1]) if site in ATTENTION_ROW_SITES else None
    if position is not None or array.ndim < 2 or len(array) != len(positions) or (keys is not None and array.ndim != 3):
        raise TraceError(
            f"{where}: {name} is {list(array.shape)}, and its first axis must be the {len(positions)} positions"
        )
    if part is not None:
        pieces.append(Piece(layer, site, tuple(positions), part, array, keys))
        return
    trace.add_rows(layer, site, tuple(positions), array, keys)


def _add_read(
    where: Path,
    trace: Trace,
    place: _Named,
    array: Array,
    slots: dict[tuple[int, int], list[int]],
    pieces: list[Piece],
) -> None:
    name, site, layer, position, part = place
    _check_array(where, place, array)
    if position is None or position >= len(trace.tokens) or array.ndim != 3 or layer is None:
        raise TraceError(f"{where}: {name} {list(array.shape)} must be {site}.LAYER.POSITION, [slot, head, dim]")
    held = slots.get((layer, position), list(range(len(array))))
    if len(held) != len(array):
        raise TraceError(f"{where}: {name} has {len(array)} rows, and {len(held)} slots are named for them")
    found = np.array(held, dtype=np.int64)
    if part is not None:
        pieces.append(Piece(layer, site, (position,), part, array, found))
        return
    trace.add_cache_read(layer, site, (position,), found, array)


def _check_array(where: Path, place: _Named, array: Array) -> None:
    name, site, layer, *_ = place
    if array.dtype.name not in (*_FLOATS, "float8_e4m3fn", "float8_e5m2") or not array.size:
        raise TraceError(f"{where}: {name} is {array.dtype} {list(array.shape)}; record floating-point values")
    if (layer is None) != (site in BEFORE_LAYERS | AFTER_LAYERS):
        raise TraceError(f"{where}: {name} must be named {site}{'.LAYER' if layer is None else ' without a layer'}")


def _slots(where: Path, arrays: dict[str, Array]) -> dict[tuple[int, int], list[int]]:
    """The position of each row of the cache, by layer and the position that read it."""
    found = {}
    for name in arrays:
        site, layer, position = _place(name)
        if site == _SLOTS and layer is not None and position is not None:
            held = _integers(where, arrays, name) or []
            if not all(0 <= slot < MAX_POSITION for slot in held):
                raise TraceError(f"{where}: {name} holds what is not a position")
            found[layer, position] = held
    return found


def _place(name: str) -> tuple[str, int | None, int | None]:
    site, *numbers = name.split(".")
    if len(numbers) > 2 or not all(n.isascii() and n.isdigit() and len(n) < 9 for n in numbers):
        return name, None, None
    found = [int(n) for n in numbers]
    return site, found[0] if found else None, found[1] if len(found) > 1 else None


def _integers(where: Path, arrays: dict[str, Array], name: str) -> list[int] | None:
    array = arrays.get(name)
    if array is None:
        return None
    if array.dtype.kind not in "iu" or array.ndim != 1 or not array.size:
        raise TraceError(f"{where}: {name} is {array.dtype} {list(array.shape)}, and must be a list of integers")
    return [int(value) for value in array]


def _calls(where: Path, array: Array) -> list[Call]:
    if array.dtype.kind not in "iu" or array.ndim != 2 or array.shape[1] != 3:
        raise TraceError(
            f"{where}: calls is {array.dtype} {list(array.shape)}, and must be [call, 3]: start, q_len, cache"
        )
    return [Call(int(start), int(q_len), int(before), None, "unknown", ()) for start, q_len, before in array]


def _members(path: Path) -> Iterator[tuple[str, Array]]:
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if not member.filename.endswith(".npy"):
                    raise TraceError(f"{path} holds {member.filename!r}, which is not an array")
                with archive.open(member) as file:
                    name = member.filename.removesuffix(".npy")
                    yield name, _array(f"{path}: {name}", file, member.file_size)
    except (zipfile.BadZipFile, OSError, EOFError, NotImplementedError, RuntimeError) as error:
        raise TraceError(f"{path} is not a readable .npz file: {error}") from error


def _files(directory: Path, folder: Path) -> Iterator[tuple[str, Array]]:
    for path in sorted(folder.glob("*.npy")):
        try:
            with inside(directory, path).open("rb") as file:
                yield path.name.removesuffix(".npy"), _array(str(path), file, path.stat().st_size)
        except OSError as error:
            raise TraceError(f"cannot read {path}: {error.strerror}") from error


def _array(where: str, file: IO[bytes], size: int) -> Array:
    """Read one array, never an object, and never more than the file holds."""
    try:
        version = np.lib.format.read_magic(file)
        reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
        if reader is None:
            raise TraceError(f"{where} is of the .npy version {version}, and this kvdrift reads 1.0 and 2.0")
        shape, fortran, dtype = reader(file)
        if dtype.hasobject:
            raise TraceError(f"{where} holds Python objects, which would have to be unpickled; save plain numbers")
        n = math.prod(shape)
        if not 0 <= n * dtype.itemsize <= size:
            raise TraceError(f"{where} claims the shape {list(shape)}, and its file has {size} bytes")
        data = io.BytesIO(file.read(n * dtype.itemsize)).getbuffer()
        if len(data) < n * dtype.itemsize:
            raise TraceError(f"{where} breaks off after {len(data)} of {n * dtype.itemsize} bytes")
        if dtype.kind == "V" and dtype.itemsize == 2 and dtype.fields is None:
            dtype = np.dtype(ml_dtypes.bfloat16)  # numpy saves bfloat16 as two bytes without a name
        return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise TraceError(f"{where} is not a readable array: {error}") from error
