"""Architectures that transformers and mlx-lm both have, against each other."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from kvdrift.errors import UsageError
from kvdrift.zoo.build import build
from kvdrift_bench.cli.faults import app
from kvdrift_bench.run.cross_runs import CrossRow, choose_kinds, compare_kind, cross_page, shared_kinds
from kvdrift_bench.run.mlx_files import options_for_mlx, write_for_mlx


@pytest.mark.parametrize(
    ("kind", "state", "place", "corrected"),
    [
        ("llama", "STRUCTURAL_DRIFT", "", ""),
        ("granitemoe", "STRUCTURAL_DRIFT", "", ""),  # sin and cos of mlx differ by more than what is made of changes
        ("mamba2", "MISMATCH", "layer 0 / layer_out", "STRUCTURAL_DRIFT"),  # docs/findings/mlx_mamba2_groups.md
        # docs/findings/nemotron_h_step_limit.md, mlx_recurrent_gemma_epsilon.md, mlx_gelu.md
        ("nemotron_h", "MISMATCH", "layer 0 / layer_out", "STRUCTURAL_DRIFT"),
        pytest.param("recurrent_gemma", "MISMATCH", "logits", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("gpt_neox", "MISMATCH", "layer 0 / mlp_out", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("gpt_bigcode", "MISMATCH", "layer 0 / mlp_out", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("phimoe", "STRUCTURAL_DRIFT", "", "", marks=pytest.mark.matrix),
        pytest.param("qwen3_next", "STRUCTURAL_DRIFT", "", "", marks=pytest.mark.matrix),
        pytest.param("qwen3_5", "STRUCTURAL_DRIFT", "", "", marks=pytest.mark.matrix),
        pytest.param("jamba", "MISMATCH", "layer 1 / mlp_out", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        ("gemma3n", "STRUCTURAL_DRIFT", "", ""),  # its upper layers read caches of lower ones, one of them a ring
        # docs/findings/mlx_gpt_oss_yarn.md, mlx_minicpm3_logits.md, mlx_llama4_text_norm.md, mlx_mimo_window.md
        ("gpt_oss", "MISMATCH", "layer 0 / q_rope", "STRUCTURAL_DRIFT"),
        pytest.param("minicpm3", "MISMATCH", "layer 1 / v_cache", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("llama4_text", "MISMATCH", "layer 1 / q_rope", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("mimo_v2_flash", "MISMATCH", "layer 1 / k_cache", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("kimi_linear", "MISMATCH", "layer 2 / k_cache", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        pytest.param("nanochat", "MISMATCH", "layer 0 / layer_in", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
        *(
            pytest.param(kind, "STRUCTURAL_DRIFT", "", "", marks=pytest.mark.matrix)
            for kind in (
                "bailing_hybrid",
                "deepseek_v2",
                "gemma4",
                "gpt2",
                "lfm2",
                "llama4",
                "minimax_m2",
                "qwen3_5_moe",
            )
        ),
    ],
)
def test_what_both_compute_alike_passes_and_what_they_do_not_is_told(
    kind: str, state: str, place: str, corrected: str
) -> None:
    row = compare_kind({"kind": kind, "versions": "v"})

    assert (row["state"], row["at"], row["place"], row["corrected"]) == (state, "float64", place, corrected), row


def test_what_cannot_be_compared_says_why_and_a_file_of_rows_is_gone_on_with(tmp_path: Path) -> None:
    row = compare_kind({"kind": "olmo", "versions": "v"})
    assert row["state"] == "NOT_COMPARED"
    assert "hf_olmo" in row["why"]
    assert "ends the process" in row["why"]
    assert "'abc' is not an architecture that both have" in _said("abc")

    page = cross_page([CrossRow(kind="b", versions="v", state="NOT_COMPARED", why="a|b")], "command", "v 1")
    assert page.endswith("| b | - | NOT_COMPARED | - | a\\|b | - |\n")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("{}\n")
    done = CliRunner().invoke(app, ["cross", "--model-type", "abc", "--rows", str(rows)])
    assert done.exit_code == 2


def _said(name: str) -> str:
    with pytest.raises(UsageError) as caught:
        choose_kinds([name])
    return str(caught.value)


def test_every_architecture_that_both_have_has_a_row_in_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs/zoo-cross.md").read_text()
    found = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][1:]

    assert found == shared_kinds()
    assert len(found) >= 80


def test_options_are_taken_from_what_says_the_same_and_no_default_is_replaced() -> None:
    config = {
        "hidden_size": 64,
        "layer_types": ["linear_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    }
    found = options_for_mlx(config, ["block_dim", "is_moe_layer", "n_group", "unknown"], SimpleNamespace(n_group=2))

    assert found == {**config, "block_dim": 64, "is_moe_layer": [False, True], "n_group": 2}


def test_weights_are_renamed_and_turned_and_none_is_lost(tmp_path: Path) -> None:
    model = build("gpt_oss")
    write_for_mlx(model, "gpt_oss", tmp_path)
    written, own = load_file(tmp_path / "model.safetensors"), model.state_dict()

    assert len(written) == len(own)
    name = "model.layers.0.mlp.experts.down_proj"
    assert torch.equal(written[f"{name}.weight"], own[name].transpose(-1, -2))
    assert torch.equal(written["lm_head.weight"], own["lm_head.weight"])
