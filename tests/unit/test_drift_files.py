"""The drift table as a file: both formats hold the same columns and read back to the bit."""

import csv
import gzip
import math
import sys
from pathlib import Path

import pytest

from kvdrift.errors import EngineUnavailable, TraceError
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import DriftRow
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site
from tests.support.traces import drift_row

ROWS = [
    drift_row("kv_aligned", "float64", address=Address('p, 1\n"é"', 3, None, Site.LOGITS), rel_l2=0.1 + 0.2),
    drift_row("kv_aligned", "float64", address=Address("q", 4, 7, Site.K_CACHE), rel_l2=math.inf, n_bad_past=2),
    drift_row("as_designed", "bfloat16", rel_l2=5e-324, max_ulp=2.0**63, sha256_prefill="0a" * 32, equal=True),
    drift_row("as_designed", "bfloat16", max_abs=-0.0, worst_slot=5, token_id=-1, sha256_decode="00" * 31 + "01"),
]


def written(rows: list[DriftRow], directory: Path) -> Path:
    return DriftTable.of(rows).write(directory)


@pytest.fixture(params=["drift.parquet", "drift.csv.gz"])
def name(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The file that is written, with pyarrow and without it."""
    if request.param == "drift.csv.gz":
        monkeypatch.setitem(sys.modules, "pyarrow", None)
    return str(request.param)


@pytest.mark.parametrize("n_rows", [0, 1, 4])
def test_a_table_reads_back_as_it_was_written(name: str, n_rows: int, tmp_path: Path) -> None:
    rows = ROWS[:n_rows]
    path = written(rows, tmp_path)
    assert path == tmp_path / name
    assert [repr(row) for row in DriftTable.read(path)] == [repr(row) for row in rows]


def test_a_nan_reads_back_as_one(name: str, tmp_path: Path) -> None:
    (row,) = DriftTable.read(written([drift_row(rel_l2=math.nan)], tmp_path))
    assert math.isnan(row.rel_l2)


def test_both_formats_have_the_same_columns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import pyarrow.parquet

    whole = pyarrow.parquet.read_table(written(ROWS, tmp_path))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with gzip.open(written(ROWS, tmp_path), "rt", encoding="utf-8", newline="") as file:
        header, *lines = csv.reader(file)
    assert header == whole.schema.names == list(DriftRow._fields)
    assert [line[header.index("layer")] for line in lines] == [str(layer) for layer in whole["layer"].to_pylist()]


def test_the_same_table_is_the_same_file(name: str, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    assert written(ROWS, tmp_path / "a").read_bytes() == written(ROWS, tmp_path / "b").read_bytes()


@pytest.mark.parametrize("damage", [b"", b"no table", "cut"])
def test_a_damaged_file_is_no_table(name: str, damage: bytes | str, tmp_path: Path) -> None:
    path = written(ROWS, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if isinstance(damage, str) else damage)
    with pytest.raises(TraceError, match="cannot read the drift table"):
        DriftTable.read(path)


def test_other_columns_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "drift.csv.gz"
    path.write_bytes(gzip.compress(b"mode,rung\nx,y\n"))
    with pytest.raises(TraceError, match="its columns are not mode, rung, prompt"):
        DriftTable.read(path)


def test_a_missing_file_is_said(name: str, tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="cannot read the drift table"):
        DriftTable.read(tmp_path / name)


def test_parquet_without_pyarrow_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = written(ROWS, tmp_path)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(EngineUnavailable, match=r"kvdrift\[parquet\]"):
        DriftTable.read(path)
