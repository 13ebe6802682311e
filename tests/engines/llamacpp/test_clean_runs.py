"""llama.cpp as it is: whatever the cache type and the attention path, an audit says that it only rounds."""

import json
from pathlib import Path

import pytest

from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.vocabulary.evidence import Verdict
from tests.support.command import kvdrift
from tests.support.gguf import ONE, audit_gguf, demo_gguf

CONFIGURATIONS = [
    ("f16", False),
    ("f16", True),
    ("q8_0", True),
    *(pytest.param(kv_type, False, marks=pytest.mark.matrix) for kv_type in ("f32", "bf16")),
    *(
        pytest.param(kv_type, True, marks=pytest.mark.matrix)
        for kv_type in ("f32", "bf16", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    ),
]


@pytest.mark.parametrize(("kv_type", "flash"), CONFIGURATIONS)
def test_a_clean_run_passes(folder: Path, kv_type: str, flash: bool) -> None:
    audit = audit_gguf(folder, kv_type=kv_type, flash=flash)
    assert audit.verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT), audit.decision.reasons
    evidence = {(item.instrument, item.mode): item for item in audit.evidence}
    for instrument in ("native", "replay"):
        assert evidence[instrument, "kv_aligned"].supports == "H0"
    ladder = evidence["ladder", "kv_aligned"]
    assert ladder.valid
    assert ladder.statistic is not None
    assert ladder.statistic < 0.5  # measured: 0.15


def test_watching_every_node_as_a_fault_does_changes_nothing(folder: Path) -> None:
    assert audit_gguf(folder, fault=Faultless()).exit_code == 0


def test_a_prompt_that_goes_through_in_several_batches_passes(folder: Path) -> None:
    audit = audit_gguf(folder, n_batch=2)
    assert audit.exit_code == 0, audit.decision.reasons


def test_batches_of_one_token_prove_no_second_route(folder: Path) -> None:
    audit = audit_gguf(folder, n_batch=1)
    assert audit.verdict is Verdict.INCONCLUSIVE
    assert any("no path proof" in reason for reason in audit.decision.reasons)


@pytest.mark.slow
@pytest.mark.matrix  # the first four layers show what all of them show
def test_the_whole_model_is_audited_from_the_command_line_and_judged_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = [word for text in ONE.values() for word in ("--prompt", text)]
    options = ("--span", "2", "--kv-type", "q8_0", "--flash-attn", "on", "--threads", "1", "--out", out)
    done = kvdrift("audit", f"llamacpp:{demo_gguf()}", *arguments, *options)
    assert done.code == 0, done.err
    report = json.loads((out / "report.json").read_text())
    assert report["environment"]["engine"] == "llamacpp"
    assert report["environment"]["dtype"] == "q4_1-kv_q8_0-flash"
    assert report["coverage"]["sites_not_offered"] == []
    assert report["coverage"]["n_layers_recorded"] == report["coverage"]["n_layers"] == 30
    routes = [route for route in report["coverage"]["routes"] if route["rung"] == "q4_1-kv_q8_0-flash"]
    assert all("FLASH_ATTN_EXT" in call["kernels"] for route in routes for call in route["prefill"])
    again = kvdrift("judge", "--markdown", out)
    assert again.code == 0
    assert again.out == (out / "report.md").read_text()
