"""Killed runs and broken files, as `./run bench kills` and `./run bench fuzz` make them, few of each."""

from pathlib import Path

import pytest

from benchmarks import fuzz, kills


@pytest.mark.slow
@pytest.mark.matrix  # tests/cli/test_processes.py kills a run as well
def test_what_a_killed_run_leaves_is_whole(tmp_path: Path) -> None:
    n_killed, found = kills.attack(tmp_path, 3, seed=1)

    assert n_killed > 0
    assert found == []

    page = tmp_path / "run" / "report.html"  # and one that is cut off would be seen
    page.write_text(page.read_text(encoding="utf-8")[:-20], encoding="utf-8")
    assert kills.whole(tmp_path / "run") is not None


@pytest.mark.parametrize("how", ["value", "bytes", "insert", "cut", "truncate", "repeat", "swap"])
def test_a_change_makes_another_file(how: str) -> None:
    data = b'{"a": [1.5, 2], "b": "word"}'

    assert fuzz.changed(data, (0, how, 0.6, b"\xff\x00\xff")) != data


def test_a_changed_header_of_safetensors_keeps_its_length_right() -> None:
    header = b'{"x": {"data_offsets": [0, 4]}}'
    broken = fuzz.changed(len(header).to_bytes(8, "little") + header + b"\0\0\0\0", (0, "value", 0.9, b"1" * 30))

    size = int.from_bytes(broken[:8], "little")
    assert b"1" * 30 in broken[8 : 8 + size]
    assert broken[8 + size :] == b"\0\0\0\0"
