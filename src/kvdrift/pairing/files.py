"""The drift table as a file: parquet where pyarrow is installed (extra `parquet`), else gzipped CSV of equal columns.

The layer of sites outside the layers is -1. Floats are written to CSV so that they read back to the bit.
"""

from __future__ import annotations

import csv
import gzip
import io
import zlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import EngineUnavailable, TraceError
from kvdrift.pairing.rows import COLUMNS, HASHES, NO_HASH, SITES, Block, array_of, site_code
from kvdrift.vocabulary.run_files import CSV, table_name
from kvdrift.vocabulary.sites import Site

_OF_BLOCK = ("mode", "rung", "prompt")
_TEXTS = {*_OF_BLOCK, "site", "dtype", *HASHES}
NAMES = ("mode", "rung", "prompt", *COLUMNS)

_Columns = Mapping[str, Sequence[Any] | NDArray[Any]]


def write_blocks(blocks: Sequence[Block], directory: Path) -> Path:
    """Write blocks into `directory` as one table and return the file."""
    path = directory / table_name()
    (_write_csv if path.name == CSV else _write_parquet)(blocks, path)
    return path


def read_blocks(path: Path) -> list[Block]:
    """Return the blocks of a file that `write_blocks` wrote.

    Raises:
        TraceError: the file is missing, damaged or has other columns.
        EngineUnavailable: it is a parquet file, and pyarrow is not installed.
    """
    columns = _read_csv(path) if path.name.endswith(".csv.gz") else _read_parquet(path)
    try:
        return list(_split(columns))
    except (ValueError, TypeError, OverflowError) as error:
        raise TraceError(f"cannot read the drift table {path}: {error}") from error


def _written(block: Block) -> dict[str, Sequence[Any]]:
    """The columns of a block as they are written: lists of text and numbers."""
    n_pairs = len(block)
    columns: dict[str, Sequence[Any]] = {name: [getattr(block, name)] * n_pairs for name in _OF_BLOCK}
    columns |= {name: block.columns[name].tolist() for name in COLUMNS}
    columns["site"] = [SITES[code].value for code in columns["site"]]
    for name in HASHES:
        columns[name] = [None if digest == NO_HASH else digest.hex() for digest in columns[name]]
    return columns


def _split(columns: _Columns) -> Iterator[Block]:
    """The blocks of a whole table: runs of pairs of one mode, rung and prompt."""
    of_block = [list(columns[name]) for name in _OF_BLOCK]
    whole = {name: array_of(columns[name], kind) for name, kind in COLUMNS.items() if name not in {"site", *HASHES}}
    whole["site"] = array_of([site_code(Site(name)) for name in columns["site"]], np.int8)
    for name in HASHES:
        whole[name] = array_of([bytes.fromhex(text) if text else None for text in columns[name]], np.void)
    runs = list(zip(*of_block, strict=True))
    starts = [i for i, run in enumerate(runs) if i == 0 or run != runs[i - 1]]
    for start, stop in pairwise([*starts, len(runs)]):
        mode, rung, prompt = runs[start]
        yield Block(mode, rung, prompt, {name: whole[name][start:stop] for name in COLUMNS})


def _write_csv(blocks: Sequence[Block], path: Path) -> None:
    with (
        path.open("wb") as raw,
        gzip.GzipFile(filename="", mode="wb", fileobj=raw, compresslevel=6, mtime=0) as packed,
        io.TextIOWrapper(packed, encoding="utf-8", newline="") as text,
    ):
        writer = csv.writer(text)
        writer.writerow(NAMES)
        for block in blocks:
            columns = _written(block)
            writer.writerows(zip(*(columns[name] for name in NAMES), strict=True))  # floats by repr, None as nothing


def _read_csv(path: Path) -> _Columns:
    try:
        with gzip.open(path, "rt", encoding="utf-8", newline="") as text:
            header, *lines = csv.reader(text)
    except (OSError, EOFError, ValueError, zlib.error, csv.Error) as error:
        raise TraceError(f"cannot read the drift table {path}: {error}") from error
    if tuple(header) != NAMES or any(len(line) != len(NAMES) for line in lines):
        raise TraceError(f"cannot read the drift table {path}: its columns are not {', '.join(NAMES)}")
    columns: dict[str, Sequence[Any]] = dict(zip(NAMES, zip(*lines, strict=True), strict=True)) if lines else {}
    try:
        return {name: _parsed(name, columns.get(name, ())) for name in NAMES}
    except (ValueError, KeyError) as error:
        raise TraceError(f"cannot read the drift table {path}: {error}") from error


def _parsed(name: str, texts: Sequence[str]) -> Sequence[Any]:
    if name in _TEXTS:
        return texts
    if name == "equal":
        return [{"True": True, "False": False}[text] for text in texts]
    return [float(text) for text in texts] if COLUMNS[name] is np.float64 else [int(text) for text in texts]


def _write_parquet(blocks: Sequence[Block], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = _schema()
    with pq.ParquetWriter(path, schema, compression="zstd") as writer:
        for block in blocks:
            if len(block):  # one at a time: as Python lists, columns take ten times their memory
                writer.write_table(pa.table(_written(block), schema=schema))


def _read_parquet(path: Path) -> _Columns:
    if find_spec("pyarrow") is None:
        raise EngineUnavailable(f"{path} is a parquet file, which takes pyarrow; pip install 'kvdrift[parquet]'")
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        data = pq.read_table(path, schema=_schema())
    except (OSError, pa.ArrowException) as error:
        raise TraceError(f"cannot read the drift table {path}: {error}") from error
    return {name: data.column(name).to_pylist() for name in NAMES}


def _schema() -> Any:
    import pyarrow as pa

    kinds = {np.float64: pa.float64(), np.bool_: pa.bool_()}
    return pa.schema(
        [(name, pa.string() if name in _TEXTS else kinds.get(COLUMNS[name], pa.int64())) for name in NAMES]
    )
