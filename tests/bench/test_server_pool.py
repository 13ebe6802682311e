"""Recorded audits of a real server are kept as they were, judged when they are read, and not asked for again."""

from __future__ import annotations

from pathlib import Path

import pytest

from kvdrift.errors import UsageError
from kvdrift.server.plan import ServerPlan
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_pool import Pool, Recorded
from kvdrift_bench.run.server_runs import Model, record, tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return tiny(tmp_path_factory.mktemp("gguf"), "Q4_1")


def test_an_audit_is_recorded_once_and_comes_back_as_it_was(model: Model, tmp_path: Path) -> None:
    asked = []

    def live() -> Recorded:
        asked.append(1)
        with started(model.file) as url:
            return record(url, model, "all defaults", ServerPlan())

    pool = Pool(tmp_path / "pool")
    first, again = (pool.get("tiny, all defaults 0", live) for _ in range(2))

    assert len(asked) == 1
    assert again.captured == first.captured
    assert len(first.captured.pairs) > 100
    assert again.verdict == first.verdict == "STRUCTURAL_DRIFT"
    assert [path.name for path in (tmp_path / "pool").iterdir()] == ["tiny-all-defaults-0.msgpack"]


def test_a_damaged_recording_is_an_error_with_its_name(tmp_path: Path) -> None:
    (tmp_path / "a.msgpack").write_bytes(b"half of")

    def never() -> Recorded:
        raise AssertionError("it is there")

    with pytest.raises(UsageError, match=r"recorded audit .*a\.msgpack.*remove it"):
        Pool(tmp_path).get("a", never)
