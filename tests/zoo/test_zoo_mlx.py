"""Types of mlx-lm as tiny models: each has a row, and a row says what came of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from kvdrift.report.schema.others import ZooRowView
from kvdrift.zoo.build_mlx import registered_mlx, tiny_arguments
from kvdrift.zoo.own_mlx import OWN_MLX, TEXT_OF
from kvdrift.zoo.rows import audit_type
from kvdrift.zoo.table import page
from tests.support.command import here, kvdrift

__all__ = ["here"]


def row_of(kind: str, *scenarios: str) -> dict[str, Any]:
    return audit_type({"type": kind, "scenarios": list(scenarios), "engine": "mlx"})


def test_a_type_is_audited_with_the_caches_that_it_makes() -> None:
    row = row_of("gemma3_text", "rewind")

    assert row["state"] in ("EXACT", "STRUCTURAL_DRIFT"), row
    assert (row["engine"], row["cache"]) == ("mlx", "RotatingKVCache, KVCache")
    assert row["mlx_lm"]
    arguments = tiny_arguments("gemma3_text")
    assert (arguments["sliding_window"], arguments["num_hidden_layers"], arguments["hidden_size"]) == (8, 4, 64)


def test_a_planted_fault_is_a_mismatch_of_its_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from mlx_lm.models.cache import KVCache

    right = KVCache.update_and_fetch

    def stale(self: Any, keys: Any, values: Any) -> Any:
        held, rest = right(self, keys, values)
        if held.shape[-2] > 9 and keys.shape[-2] == 1:
            held[:, :, 3] = held[:, :, 4]
        return held, rest

    monkeypatch.setattr(KVCache, "update_and_fetch", stale)
    row = row_of("llama")

    assert row["state"] == "MISMATCH"
    assert "layer 0 / k_cache" in str(row["first_failure"])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [("olmo", "its module ends the process"), ("bitnet", "No Metal back-end")],
)
def test_what_cannot_run_here_is_not_applicable_and_says_why(kind: str, reason: str) -> None:
    row = row_of(kind)

    assert row["state"] == "NOT_APPLICABLE"
    assert reason in row["reason"]


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("plamo3", "layer 0 / k_cache"),  # docs/findings/plamo3_window_of_a_ring.md
        ("phi3small", "layer 0 / attn_out"),  # docs/findings/mlx_phi3small_mask.md
    ],
)
def test_a_type_is_judged_as_a_script_of_mlx_lm_alone_confirms(kind: str, place: str) -> None:
    row = row_of(kind)

    assert row["state"] == "MISMATCH"
    assert row["first_failure"].endswith(place)


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("mamba", "MISMATCH"),  # docs/findings/mlx_rows_of_unequal_length.md
        pytest.param("mamba2", "STRUCTURAL_DRIFT", marks=pytest.mark.matrix),
    ],
)
def test_states_that_count_padding_are_found(kind: str, verdict: str) -> None:
    assert row_of(kind, "batch_padded")["verdicts"]["batch_padded"] == verdict


def test_two_latent_attentions_of_a_layer_are_not_compared_in_their_two_forms() -> None:
    assert row_of("longcat_flash")["state"] == "STRUCTURAL_DRIFT"


def test_every_type_of_the_tables_is_one_of_mlx_lm_and_has_a_row_in_the_page() -> None:
    text = (Path(__file__).parents[2] / "docs/zoo-mlx.md").read_text().partition("## Why")[0]
    found = [line.split(" | ")[0].removeprefix("| ") for line in text.splitlines() if line.startswith("| ")][1:]

    assert set(OWN_MLX) | set(TEXT_OF) <= set(registered_mlx())
    assert found == sorted(registered_mlx())


def test_a_page_has_a_column_for_each_scenario() -> None:
    made: dict[str, Any] = {"scenarios": ["rewind", "verify"], "transformers": "5"}
    right: dict[str, Any] = {"rewind": "EXACT", "verify": "MISMATCH"}
    rows = [
        ZooRowView(type="b", state="EXACT", verdicts=right, **made),
        ZooRowView(type="a", state="MISMATCH", first_failure="p", **made),
    ]

    lines = page(rows, "kvdrift zoo", {"kvdrift": "0"}).partition("\n\n## Why")[0].splitlines()

    assert lines[-3:] == [
        "|---|---|---|---|---|---|---|---|",
        "| a |  |  | MISMATCH |  |  |  | p |",
        "| b |  |  | EXACT |  | = | ≠ |  |",
    ]
    assert lines[-4].startswith("| type | parameters | cache | plain decode | excess | rewind | verify | first failure")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--engine", "vllm"), "--engine is 'vllm'; the zoo knows the types of hf, mlx"),
        (
            ("--engine", "mlx", "--model-type", "bart"),
            "'bart' is not a causal language model that the installed mlx-lm",
        ),
    ],
)
def test_another_engine_and_another_type_are_one_line(here: Path, words: tuple[str, ...], said: str) -> None:
    done = kvdrift("zoo", *words)

    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert done.err.startswith(f"kvdrift: {said}")
