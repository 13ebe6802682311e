"""Reads a dump of logprobs: JSON Lines of any known shape, or columns in .npz or .safetensors."""

from __future__ import annotations

import json
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kvdrift.errors import TraceError, UsageError
from kvdrift.logprobs.dump import Dump, SequenceRecord, as_columns
from kvdrift.logprobs.shapes import LOGPROBS, MASKS, NAMES, TOKENS, is_token_row, read_record, read_token_row
from kvdrift.trace.store import COLUMN_DTYPES, read_tensors

SUFFIXES = (".jsonl", ".ndjson", ".json", ".npz", ".safetensors")

# What a damaged file breaks in: numbers beyond 64 bits overflow, brackets in brackets recurse, an archive is cut off.
_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    OverflowError,
    RecursionError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
_MOST_WORDS = 200  # of what was found in the file


def is_dump(target: object) -> bool:
    """Whether something names a dump of logprobs: a file with one of SUFFIXES, with or without `:COLUMN`."""
    return isinstance(target, str | Path) and _split(str(target))[0].suffix.lower() in SUFFIXES


def read_dump(target: str | Path) -> Dump:
    """Read the dump `FILE` or `FILE:COLUMN`.

    Raises:
        UsageError: there is no such file.
        TraceError: it cannot be read, or has none of the known shapes.
    """
    path, column = _split(str(target))
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                records = list(_arrays({name: archive[name] for name in archive.files}, str(path), column))
        elif path.suffix.lower() == ".safetensors":
            records = list(_arrays(read_tensors(path, COLUMN_DTYPES), str(path), column))
        else:
            records = list(_lines(path, column))
        return as_columns(str(target), records)
    except _UNREADABLE as error:
        what = next(iter(str(error).strip().splitlines()), "")[:_MOST_WORDS]
        raise TraceError(
            f"cannot read {path}: {type(error).__name__}: {what}; docs/compare.md has the shapes"
        ) from error


def _split(text: str) -> tuple[Path, str | None]:
    """Part FILE from COLUMN."""
    if Path(text).is_file():
        return Path(text), None
    file, colon, column = text.rpartition(":")
    return (Path(file), column) if colon and column.isidentifier() else (Path(text), None)


def _lines(path: Path, column: str | None) -> Iterator[SequenceRecord]:
    items = list(_items(path))
    if items and is_token_row(items[0][1]):
        yield from _token_rows(items, column)
        return
    for where, item in items:
        yield from read_record(item, where, column)


def _items(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    text = path.read_text(encoding="utf-8")
    if path.suffix.lower() == ".json":
        whole = json.loads(text)
        rows = [(f"{path}, entry {i}", item) for i, item in enumerate(whole if isinstance(whole, list) else [whole])]
    else:
        rows = []
        for number, line in enumerate(text.splitlines(), 1):
            if not line.strip():
                continue
            try:
                rows.append((f"{path}, line {number}", json.loads(line)))
            except ValueError as error:
                raise TraceError(f"{path}, line {number} is not JSON: {error}; was the file cut off?") from error
    for where, item in rows:
        if not isinstance(item, Mapping):
            raise TraceError(f"{where} is {type(item).__name__}, and not an object")
        yield where, item


def _token_rows(items: Sequence[tuple[str, Mapping[str, Any]]], column: str | None) -> Iterator[SequenceRecord]:
    """Put lines of a single token each together, by the name of their sequence and their position."""
    found: dict[str | None, list[tuple[Any, int | str, float | None]]] = {}
    for where, item in items:
        name, position, token, logprob = read_token_row(item, where, column)
        found.setdefault(name, []).append((position, token, logprob))
    for name, rows in found.items():
        if all(row[0] is not None for row in rows):
            rows.sort(key=lambda row: int(row[0]))
            places = [int(row[0]) for row in rows]
            if len(set(places)) < len(places):
                twice = next(place for place in places if places.count(place) > 1)
                raise TraceError(f"sequence {name} has position {twice} more than once")
        yield SequenceRecord(name=name, tokens=[row[1] for row in rows], logprobs=[row[2] for row in rows])


def _arrays(arrays: Mapping[str, np.ndarray[Any, Any]], source: str, column: str | None) -> Iterator[SequenceRecord]:
    """Read columns: [sequence, token] with a mask or lengths, or [token] with the sequence of each."""
    tokens = next((arrays[name] for name in (*TOKENS, "token") if name in arrays), None)
    names = [column] if column is not None else [name for name in (*LOGPROBS, "logprob") if name in arrays]
    if tokens is None or not names or names[0] not in arrays:
        raise TraceError(f"{source} has no token_ids or no {column or 'logprobs'}; it has {', '.join(arrays)}")
    if len(names) > 1:
        raise TraceError(f"{source} has logprobs under {' and '.join(names)}; name one of them, as in FILE:{names[0]}")
    logprobs = np.asarray(arrays[names[0]], dtype=np.float64)
    if tokens.shape != logprobs.shape:
        raise TraceError(f"{source}: tokens of shape {list(tokens.shape)}, logprobs of shape {list(logprobs.shape)}")
    labels = next((arrays[name] for name in (*NAMES, "sequence") if name in arrays), None)
    if tokens.ndim == 2:
        mask = next((arrays[name].astype(bool) for name in MASKS if name in arrays), np.ones(tokens.shape, dtype=bool))
        if "lengths" in arrays:
            mask = mask & (np.arange(tokens.shape[1])[None] < arrays["lengths"][:, None])
        rows = [(tokens[i][mask[i]], logprobs[i][mask[i]]) for i in range(len(tokens))]
        called = [None if labels is None else str(labels[i]) for i in range(len(tokens))]
    elif labels is not None and labels.shape == tokens.shape:
        called = [str(label) for label in dict.fromkeys(labels.tolist())]
        rows = [(tokens[labels.astype(str) == name], logprobs[labels.astype(str) == name]) for name in called]
    else:
        raise TraceError(f"{source}: columns of one row each need the column sequence, one entry a token")
    for name, (ids, values) in zip(called, rows, strict=True):
        yield SequenceRecord(name=name, tokens=[int(i) for i in ids], logprobs=[float(value) for value in values])
