"""Trace directories of format version 1, one of each kind, judged again: every field of report.json stays as it was.

Each archive holds the traces of a small run and `expected-report.json`, what was said of them when they were recorded.
Texts and whole numbers must be equal; the last bits of a float depend on the BLAS of the machine.
"""

from __future__ import annotations

import json
import math
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from kvdrift.pipeline.judge import judge_directory

ARCHIVES = sorted((Path(__file__).parent / "traces").glob("*.tar.xz"))
# Far above what another BLAS changes, far below what a changed formula does.
FLOATS_AGREE = 1e-9


def differences(path: str, expected: Any, found: Any) -> Iterator[str]:
    """Yield the places where two reports differ."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected.keys() | found.keys():
            yield from differences(f"{path}.{key}", expected.get(key, "missing"), found.get(key, "missing"))
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for index, (first, second) in enumerate(zip(expected, found, strict=True)):
            yield from differences(f"{path}[{index}]", first, second)
    elif isinstance(expected, float) and isinstance(found, float):
        if not math.isclose(expected, found, rel_tol=FLOATS_AGREE):
            yield f"{path}: {expected!r} became {found!r}"
    elif type(expected) is not type(found) or expected != found:
        yield f"{path}: {expected!r} became {found!r}"


def unpacked(archive: Path, folder: Path) -> tuple[Path, dict[str, Any]]:
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    expected = folder / "expected-report.json"
    report = json.loads(expected.read_text(encoding="utf-8"))
    expected.unlink()
    return folder, report


@pytest.mark.parametrize("archive", ARCHIVES, ids=lambda path: path.name.removesuffix(".tar.xz"))
def test_a_recorded_run_is_judged_as_before(archive: Path, tmp_path: Path) -> None:
    folder, expected = unpacked(archive, tmp_path)
    result, recognised = judge_directory(folder, command="kvdrift judge DIR")
    found = json.loads(result.to_json())
    if recognised is not None:  # such files may have no date of their own, and the report has that of its making
        del expected["created"], found["created"]

    assert list(differences("report", expected, found)) == []


def test_every_kind_of_trace_and_of_verdict_is_there() -> None:
    kinds = {path.name.split("_")[0].removesuffix(".tar.xz") for path in ARCHIVES}

    assert kinds == {"own", "written", "npz", "greta", "sglang", "debugger"}


def test_the_comparison_can_fail() -> None:
    assert list(differences("r", {"a": [1.0, 2]}, {"a": [1.0 + 1e-6, 2]})) == ["r.a[0]: 1.0 became 1.000001"]
    assert list(differences("r", {"a": 1}, {})) == ["r.a: 1 became 'missing'"]
    assert list(differences("r", 1, True)) == ["r: 1 became True"]
    assert list(differences("r", math.nan, 1.0)) == ["r: nan became 1.0"]
