"""Servers and engines as A and B: what they say while they run is compared, and the side that is off is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvdrift
from kvdrift.cli.app import app
from kvdrift.errors import AlignmentError, UsageError
from kvdrift_bench.run.llama_server import started
from kvdrift_bench.run.server_faults import TWICE_FED, ServerFault, faulty, stale_slot
from tests.support.gguf import one_core
from tests.support.llama_server import byte_prompts, tiny_with_text
from tests.support.serving import Engine, Vllm, ids_of, serving, some_prompts

__all__ = ["one_core"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gguf")


def test_two_clean_servers_pass_and_what_they_said_can_be_judged_again(folder: Path, tmp_path: Path) -> None:
    model = tiny_with_text(folder)
    with started(model, n_parallel=1) as a, started(model, n_parallel=4, kv_unified=True) as b:
        result = kvdrift.compare(a, b, prompts=byte_prompts(), span=6, out=tmp_path / "run")

    assert result.verdict == "STRUCTURAL_DRIFT", result.summary()
    assert result.guilty is None
    files = [tmp_path / "run" / f"{side}.jsonl" for side in ("a", "b", "third")]
    assert [len(file.read_text().splitlines()) for file in files] == [24, 24, 24]
    again = kvdrift.compare(files[0], files[1], third=files[2], dtype_a="fp16", dtype_b="fp16")
    assert (again.verdict, again.view["test"]) == (result.verdict, result.view["test"])
    assert result.view["n_tokens"] == 24 * 6
    assert "float16: 0.01, stated" in result.view["noise"]["source"]  # its cache, not its weights


@pytest.mark.parametrize(
    ("fault", "guilty"),
    [(TWICE_FED, "A"), (ServerFault("rope base", settings=(("rope_freq_base", "20000"),)), "B")],
    ids=["decode_of_a", "all_of_b"],
)
def test_the_server_that_is_off_is_named(fault: ServerFault, guilty: str, folder: Path, tmp_path: Path) -> None:
    model = tiny_with_text(folder)
    with faulty(model, fault, tmp_path) as off, started(model, n_parallel=1) as right:
        sides = (off, right) if guilty == "A" else (right, off)
        result = kvdrift.compare(*sides, prompts=byte_prompts(), span=4)

    assert result.verdict == "MISMATCH", result.summary()
    assert result.guilty == guilty
    assert not any("--third" in step for step in result.view["recommendations"])  # it was there


@pytest.mark.parametrize("first", ["server", pytest.param("engine", marks=pytest.mark.matrix)])
def test_a_server_and_an_engine_agree_on_a_file(first: str, folder: Path) -> None:
    model = tiny_with_text(folder, "Q4_1")
    with started(model, n_parallel=1) as url:
        sides = (url, f"llamacpp:{model}") if first == "server" else (f"llamacpp:{model}", url)
        result = kvdrift.compare(*sides, prompts=byte_prompts(6), span=3)

    assert result.verdict == "STRUCTURAL_DRIFT", result.summary()
    assert "A int8" in result.view["noise"]["source"]  # activations, since both hold the same packed weights
    assert "B int8" in result.view["noise"]["source"]


@pytest.mark.matrix
def test_a_stale_slot_in_a_server_is_found_beside_an_engine(folder: Path, tmp_path: Path) -> None:
    model = tiny_with_text(folder)
    with faulty(model, ServerFault("stale", edit=stale_slot(0)), tmp_path) as url:
        result = kvdrift.compare(url, f"llamacpp:{model}", prompts=byte_prompts(), span=4)

    assert (result.verdict, result.guilty) == ("MISMATCH", "A"), result.summary()


@pytest.mark.matrix
def test_a_server_that_scores_whole_prompts_gets_longer_texts() -> None:
    with serving(Vllm(Engine(fault="rope"))) as a, serving(Vllm(Engine())) as b:
        result = kvdrift.compare(a.url, b.url, prompts=some_prompts(12), dtype_a="fp32", dtype_b="fp32")

    assert (result.verdict, result.guilty) == ("MISMATCH", "A"), result.summary()
    assert result.view["n_tokens"] == 24 * 32


def test_what_cannot_be_compared_is_told_in_one_line(folder: Path, tmp_path: Path) -> None:
    model = tiny_with_text(folder)
    other = tiny_with_text(folder, "Q4_1")
    out = tmp_path / "run"
    with started(model, n_parallel=1) as url:
        with pytest.raises(UsageError, match=r"take 216 requests to .*--max-requests 2"):
            kvdrift.compare(url, f"llamacpp:{other}", prompts=byte_prompts(), out=out, max_requests=50)
        with pytest.raises(UsageError, match="third is not for a server"):
            kvdrift.compare(url, url, third="third.jsonl", out=out)
        with pytest.raises(UsageError, match="A is a server and B is a dump of logprobs"):
            kvdrift.compare(url, "dump.jsonl", out=out)
        with pytest.raises(UsageError, match="the prompt 'p' is empty"):
            kvdrift.compare(f"llamacpp:{other}", url, prompts={"p": []}, out=out)
        told = CliRunner().invoke(app, ["compare", url, "http://127.0.0.1:9/v1", "--out", str(out)])
    assert told.exit_code == 3
    assert "cannot reach" in told.stderr
    assert not out.exists()


def test_other_tokenizers_are_told() -> None:
    class OtherIds(Vllm):
        def complete(self, body: Any) -> dict[str, Any]:
            return super().complete({**body, "prompt": [1, *ids_of(body["prompt"])]})

    told = "the tokenizers differ: the prompt 'p' has 10 tokens in A and 11 in B"
    with (
        serving(Vllm(Engine())) as a,
        serving(OtherIds(Engine())) as b,
        pytest.raises(AlignmentError, match=told),
    ):
        kvdrift.compare(a.url, b.url, prompts={"p": "some words"})


def test_the_report_names_the_servers(tmp_path: Path) -> None:
    out = tmp_path / "run"
    with serving(Vllm(Engine())) as a, serving(Vllm(Engine())) as b:
        kvdrift.compare(a.url, b.url, prompts=some_prompts(3), span=4, dtype_a="fp32", dtype_b="fp32", out=out)
        report = json.loads((out / "report.json").read_text())
        assert a.url.removesuffix("/v1") in report["environment"]["dumps"]["A"]["source"]
        assert b.url.removesuffix("/v1") in (out / "report.html").read_text()
