"""Architectures that transformers and mlx-lm both have, against each other."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvdrift.errors import UsageError
from kvdrift_bench.cli.faults import app
from kvdrift_bench.run.cross_runs import CrossRow, choose_kinds, compare_kind, cross_page, shared_kinds


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
