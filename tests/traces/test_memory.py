"""What judging traces takes of memory: neither the number of prompts nor the size of a file counts."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from benchmarks.big_traces import Shape, write_big
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace.mapped import map_file

MB = 1 << 20


def shape(n_tokens: int, n_layers: int) -> Shape:
    return Shape(n_tokens=n_tokens, n_positions=2, n_layers=n_layers, hidden=256, heads=4, kv_heads=2, dim=64)


def peak(folder: Path, n_layers: int, n_prompts: int) -> tuple[float, float]:
    """The size of all files, and the most that judging them holds beside mapped files, in MB."""
    size = write_big(folder, shape(2048, n_layers), n_prompts)
    tracemalloc.start()
    try:
        judge_directory(folder)
        return size / MB, tracemalloc.get_traced_memory()[1] / MB
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[float, float]:
    folder = tmp_path_factory.mktemp("alone")
    write_big(folder / "first", shape(16, 1), 1)
    judge_directory(folder / "first")  # what is imported and compiled once is not a cost of traces
    return peak(folder / "t", 2, 1)


@pytest.mark.parametrize(("n_layers", "n_prompts"), [(2, 4), (8, 1)])
def test_more_traces_take_no_more_memory(
    tmp_path: Path, alone: tuple[float, float], n_layers: int, n_prompts: int
) -> None:
    """More prompts, or more of each: an eighth of what is added is the drift table and the manifest."""
    less, before = alone
    more, after = peak(tmp_path / "t", n_layers, n_prompts)
    assert more > 3 * less
    assert after - before < (more - less) / 8, (before, after)


def test_pages_go_once_many_bytes_were_read(tmp_path: Path) -> None:
    file = tmp_path / "values"
    file.write_bytes(bytes(64 << 20))
    pages = map_file(file)
    values = np.frombuffer(pages.data, dtype=np.uint8)
    before = mapped_mb()

    assert values.sum() == 0
    assert mapped_mb() - before > 60
    pages.count(values.nbytes)
    assert mapped_mb() - before < 8
    assert values.sum() == 0  # the values are still there


def mapped_mb() -> float:
    """Pages of files that are in memory of this process."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssFile"))
    return int(line.split()[1]) / 1024
