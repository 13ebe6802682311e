"""Whether llama.cpp computes the same again and in batches: rounding of its own kinds of operations is jitter,
a row that sees its neighbours is not."""

from pathlib import Path

import pytest

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.pipeline.determinism import Determinism, examine
from kvdrift.verdict.claims import parse_claim
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf
from tests.support.command import kvdrift
from tests.support.neighbours import SeesItsNeighbours

TEXT = {"a": (3, 9, 17, 22, 41, 7, 60, 12, 33)}
NEIGHBOURS = ("neighbours of 2", "neighbours of 8")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_gguf(tmp_path_factory.mktemp("tiny") / "llama.gguf", "llama")


def examined(path: Path, fault: Faultless | None = None, *claims: str) -> Determinism:
    with LlamaCppEngine(path, threads=1, fault=fault) as engine:
        return examine(engine, TEXT, engine.encode, n_runs=2, claims=[parse_claim(text) for text in claims])


def test_a_model_as_it_is_computes_the_same_again_and_in_batches_up_to_rounding(tiny: Path) -> None:
    found = examined(tiny, None, "kv-dtype=fp16")
    states = {group.name: group.state for group in found.groups}

    assert states["runs"] == "bit-identical"
    assert set(states) == {"runs", "batch of 2", "batch of 8", *NEIGHBOURS}
    assert set(states.values()) <= {"bit-identical", "jitter"}, [group.text for group in found.groups]
    assert [item.answer for item in found.answers] == ["in effect"]
    assert found.exit_code == 0


def test_rows_that_see_each_other_are_different(tiny: Path) -> None:
    found = examined(tiny, SeesItsNeighbours())
    states = {group.name: group.state for group in found.groups}

    assert states["runs"] == "bit-identical"
    assert {states[name] for name in NEIGHBOURS} == {"different"}
    assert found.exit_code == 1


def test_the_command(tiny: Path) -> None:
    done = kvdrift("determinism", str(tiny), "--runs", "2", "--claim", "batch-invariant")

    assert done.code in (0, 1), done.err
    assert done.out.startswith("llama at float32")
    assert "runs: bit-identical" in done.out
    assert "batch-invariant: " in done.out
