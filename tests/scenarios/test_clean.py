"""Clean models: no applicable scenario may say MISMATCH, and what does not apply says why."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.scenarios.catalogue import SCENARIOS
from kvdrift.vocabulary.evidence import Verdict
from tests.support.audits import by_architecture
from tests.support.carriers import one_thread
from tests.support.matrix import further
from tests.support.tiny import tiny_model

PROMPTS = {"long": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [4, 3, 2, 1, 9, 8, 7, 6, 5]}
NAMES = [scenario.name for scenario in SCENARIOS]

# What transformers itself gets wrong on a clean install: the verdict, and where it is written up.
_MOVED = ("MISMATCH", "docs/findings/export_import_of_a_sliding_cache.md")
_SWITCH = ("MISMATCH", "docs/findings/rope_tables_by_length.md")
_BAMBA = ("MISMATCH", "docs/findings/bamba_positions_on_a_cache.md")
_CROPPED = ("MISMATCH", "docs/findings/crop_of_a_recurrent_state.md")
FINDINGS: dict[tuple[str, str], tuple[str, str]] = {
    **{
        (model, name): _CROPPED
        for model in ("mamba", "mamba2", "qwen3_next", "jamba", "falcon_h1")
        for name in ("rewind", "rewind_edge", "draft_rounds")
    },
    **{(name, "export_import"): _MOVED for name in ("mistral", "gemma2", "gemma3", "gpt_oss", "gemma3n")},
    **{
        (model, name): ("MISMATCH", "docs/findings/mamba_state_of_several_tokens.md")
        for model in ("jamba", "mamba")
        for name in ("chunked_prefill", "verify", "recurrent_state", "prefix_reuse")
    },
    ("mamba", "long_context"): ("MISMATCH", "docs/findings/mamba_state_of_several_tokens.md"),  # ends with two at once
    ("mamba", "batch_padded"): ("MISMATCH", "docs/findings/mamba_mask_of_a_decode_step.md"),
    **{("zamba2", name): ("MISMATCH", "docs/findings/zamba2_time_step_of_a_decode_step.md") for name in NAMES},
    ("falcon_h1", "select_rows"): ("INCONCLUSIVE", "docs/findings/rows_of_a_hybrid_cache.md"),
    ("falcon", "static_cache"): ("INCONCLUSIVE", "docs/findings/falcon_alibi_on_a_static_cache.md"),
    ("phi3_longrope", "rope_switch"): _SWITCH,
    ("llama_ntk", "rope_switch"): _SWITCH,
    ("llama_ntk", "last_positions"): _SWITCH,
    # With padding, and in generate, positions are passed to the model, and are right.
    **{
        ("bamba", name): _BAMBA
        for name in NAMES
        if name not in ("batch_padded", "long_context", "generate_greedy", "generate_beam")
    },
}
# Where all layers are alike, or the first two are one of each kind, two of them show what three would.
OF_TWO_LAYERS = (
    "llama",
    "mistral",
    "gemma2",
    "phi3_longrope",
    "llama_ntk",
    "qwen3",
    "qwen3_moe",
    "gpt2",
    "falcon",
    "bloom",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "bamba",
    "jamba",
    "falcon_h1",
)
ARCHITECTURES = [
    "llama",
    "mistral",
    "gemma2",
    "gemma3",
    "phi3_longrope",
    "llama_ntk",
    "qwen3",
    "qwen3_moe",
    "gpt2",
    "falcon",
    "bloom",
    "gpt_oss",
    "deepseek_v3",
    "mamba",
    "mamba2",
    "bamba",
    "qwen3_next",
    "jamba",
    "falcon_h1",
    "zamba2",
    "gemma3n",
]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def rows_of(model: Any, scenarios: Any = NAMES) -> dict[str, dict[str, Any]]:
    view = kvdrift.audit(model, prompts=PROMPTS, span=2, scenarios=scenarios).view
    return {row["name"]: row for row in view["scenarios"]}


@pytest.mark.parametrize("architecture", by_architecture(ARCHITECTURES, core=("llama",)))
def test_a_clean_model_alarms_only_where_a_finding_is_known(architecture: str) -> None:
    options: dict[str, Any] = {"num_hidden_layers": 2} if architecture in OF_TWO_LAYERS else {}
    rows = rows_of(tiny_model(architecture, **options))

    alarms = {name: row["verdict"] for name, row in rows.items() if row["verdict"] in ("MISMATCH", "INCONCLUSIVE")}
    known = {
        name: verdict
        for (model, name), (verdict, _) in FINDINGS.items()
        if model == architecture and rows[name]["applicable"]
    }
    assert alarms == known, {name: (rows[name]["first_failure"], rows[name]["reasons"]) for name in alarms}
    assert all(row["reasons"] for row in rows.values() if not row["applicable"])
    assert sum(row["applicable"] for row in rows.values()) >= 9


@pytest.mark.parametrize(
    ("architecture", "name"), [("gemma3", "window_edge"), ("mamba2", "recurrent_state"), ("gemma3n", "shared_kv")]
)
def test_what_llama_lacks_passes_where_it_is(architecture: str, name: str) -> None:
    (row,) = rows_of(tiny_model(architecture), [name]).values()

    assert row["applicable"]
    assert row["verdict"] in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), row["reasons"]


def test_every_finding_is_written_up_with_its_script() -> None:
    root = Path(__file__).parents[2]
    for _, document in FINDINGS.values():
        assert (root / document).is_file()
        assert (root / document).with_suffix(".py").is_file()


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float64)], ids=str)
def test_the_native_dtype_does_not_matter(dtype: torch.dtype) -> None:
    rows = rows_of(tiny_model("llama", dtype=dtype), ["verify", "batch_padded", "second_call", "rewind"])

    assert {row["verdict"] for row in rows.values()} <= {Verdict.EXACT, Verdict.STRUCTURAL_DRIFT}


def test_what_does_not_apply_says_why() -> None:
    rows = rows_of(tiny_model("mamba2"), ["window_edge", "export_import", "shared_kv", "rope_switch"])

    assert {name: row["reasons"] for name, row in rows.items()} == {
        "window_edge": ["no layer has a sliding window"],
        "export_import": ["only a dynamic cache of keys and values can be exported"],
        "shared_kv": ["no layer reads the keys and values of another"],
        "rope_switch": ["positions are encoded by one table at every length"],
    }


def test_nothing_applicable_is_inconclusive() -> None:
    audit = kvdrift.audit(tiny_model("llama"), prompts=PROMPTS, scenarios=["window_edge"])

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert audit.exit_code == 6
    assert audit.view["reasons"] == [
        "no scenario is applicable",
        "window_edge: no layer has a sliding window",
    ]
    assert "no scenario is applicable" in audit.to_markdown()
