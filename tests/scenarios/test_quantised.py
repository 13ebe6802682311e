"""Quantised caches: honest ones pass, what cannot be had says why, and a saved run is judged the same."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

import kvdrift
from kvdrift.engines.hf.quantised import why_not_quantised
from kvdrift.instruments.route import prove_honest_route
from kvdrift.pipeline.judge import judge_directory
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import Call
from kvdrift.vocabulary.plan import Mode
from tests.support.carriers import one_thread
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
BOTH = ["quantised_cache", "float8_cache"]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    out = tmp_path_factory.mktemp("quantised") / "run"
    audit = kvdrift.audit(tiny_model("qwen3", dtype=torch.bfloat16), prompts=PROMPTS, span=2, out=out, scenarios=BOTH)
    return out, audit


def test_honest_quantisation_is_no_fault_in_bfloat16(saved: tuple[Path, Any]) -> None:
    _, audit = saved

    verdicts = {row["name"]: row["verdict"] for row in audit.view["scenarios"]}
    assert set(verdicts) == set(BOTH)
    assert set(verdicts.values()) <= {Verdict.EXACT, Verdict.STRUCTURAL_DRIFT}, audit.view["reasons"]
    assert [caveat.code for caveat in audit.caveats].count("QUANTISED_CACHE") == 1


def test_a_saved_run_is_judged_to_the_same_report(saved: tuple[Path, Any]) -> None:
    directory, audit = saved

    assert judge_directory(directory)[0].to_json() == audit.to_json()


def test_a_reference_that_is_not_known_to_be_quantised_is_no_proof(saved: tuple[Path, Any], tmp_path: Path) -> None:
    copy = tmp_path / "run"
    for path in saved[0].rglob("*"):
        target = copy / path.relative_to(saved[0])
        if path.is_dir():
            target.mkdir(parents=True)
        elif path.name == "manifest.json":
            manifest = msgspec.json.decode(path.read_bytes())
            for scenario in manifest["scenarios"]:
                for segment in scenario["segments"]:
                    segment["quantised"] = None
            target.write_bytes(msgspec.json.encode(manifest))
        else:
            target.hardlink_to(path)

    judged, _ = judge_directory(copy)

    assert judged.verdict is not Verdict.STRUCTURAL_DRIFT
    assert judged.verdict is not Verdict.EXACT


def pair_of(reference: Call, decode: Call) -> PassPair:
    first = Trace("p", "prefill", "scenarios", "float32", (1, 2, 3, 4, 5))
    second = Trace("p", "decode", "quantised_cache", "float32", (1, 2, 3, 4, 5))
    first.calls.append(reference)
    second.calls.append(decode)
    return PassPair(Mode.AS_DESIGNED, first, second, (3,))


GOOD = Call(start=3, q_len=2, cache_len_before=3, kv_len=5, attention="eager", kernels=())
STEP = Call(start=3, q_len=1, cache_len_before=3, kv_len=4, attention="eager", kernels=())


@pytest.mark.parametrize(
    ("reference", "decode", "problem"),
    [
        (GOOD, STEP, None),
        (msgspec.structs.replace(GOOD, start=0, cache_len_before=0), STEP, "the reference ran on an empty cache"),
        (STEP, STEP, "it is the decode route"),
        (GOOD, GOOD, "decode fed several tokens at once"),
        (GOOD, msgspec.structs.replace(STEP, kv_len=1), "read 1 keys, so no cached one"),
    ],
)
def test_the_route_is_proven_by_what_was_read(reference: Call, decode: Call, problem: str | None) -> None:
    problems = prove_honest_route(pair_of(reference, decode)).problems

    assert len(problems) == (problem is not None)
    assert problem is None or problem in problems[0]


def test_a_package_that_is_missing_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    assert why_not_quantised("quantised-int4", model.config) is None
    monkeypatch.setattr("transformers.cache_utils.is_optimum_quanto_available", lambda: False)

    reason = why_not_quantised("quantised-int4", model.config)

    assert reason is not None
    assert "pip install optimum-quanto" in reason
    assert why_not_quantised("quantised-fp8", model.config) is None


@pytest.mark.parametrize("architecture", ["gemma2", "mamba2"])
def test_a_model_whose_layers_cannot_be_quantised_says_so(architecture: str) -> None:
    reason = why_not_quantised("quantised-int4", tiny_model(architecture).config)

    assert reason is not None
    assert "only full attention layers" in reason
