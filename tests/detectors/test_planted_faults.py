"""Every planted fault is found at its true address, on every architecture that can carry it."""

import pytest
import torch

import kvdrift
from kvdrift.faults import corpus_for
from kvdrift.verdict.model import Verdict
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
N_LAYERS = 3
FAULTS = [fault.name for fault in corpus_for(N_LAYERS)]
ARCHITECTURES = [
    "llama",
    "qwen3",
    "gemma2",
    "gemma3",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "qwen3_moe",
    "phi",
    "phi3",
    "gpt_oss",
]
GROUPED = {"llama", "qwen3", "gemma2", "gemma3", "mixtral", "qwen3_moe", "phi3", "gpt_oss"}


def can_carry(architecture: str, fault: str) -> bool:
    """Heads can be mapped wrongly only where several share a kv head."""
    return fault != "heads_tiled" or architecture in GROUPED


CASES = [(a, f) for a in ARCHITECTURES for f in FAULTS if can_carry(a, f)]


@pytest.mark.parametrize(("architecture", "name"), CASES)
def test_a_fault_is_found_where_it_was_planted(architecture: str, name: str) -> None:
    fault = next(fault for fault in corpus_for(N_LAYERS) if fault.name == name)
    model = tiny_model(architecture, dtype=torch.bfloat16)

    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.kind == "semantic"
    assert audit.exit_code == 1
    assert audit.first_failure is not None
    assert audit.first_failure.layer == (fault.layer or 0)
    assert audit.first_failure.site in fault.sites


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
@pytest.mark.parametrize("name", FAULTS)
def test_each_mode_finds_it_alone(mode: str, name: str) -> None:
    fault = next(fault for fault in corpus_for(N_LAYERS) if fault.name == name)
    model = tiny_model("llama", dtype=torch.bfloat16)

    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, mode=mode)  # type: ignore[arg-type]

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site in fault.sites) == (fault.layer or 0, True)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_a_fault_is_found_at_any_dtype_and_kernel(dtype: torch.dtype, attention: str) -> None:
    fault = next(fault for fault in corpus_for(N_LAYERS) if fault.name == "all_scales_1.001")
    model = tiny_model("llama", dtype=dtype, attention=attention)

    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.site in fault.sites


@pytest.mark.parametrize("name", FAULTS)
def test_the_same_model_is_clean_again_once_the_fault_is_gone(name: str) -> None:
    fault = next(fault for fault in corpus_for(N_LAYERS) if fault.name == name)
    model = tiny_model("llama", dtype=torch.bfloat16)
    with fault.plant(model):
        pass

    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


def test_the_slot_of_a_stale_row_is_named() -> None:
    fault = next(fault for fault in corpus_for(N_LAYERS) if fault.name == "stale_slot")
    model = tiny_model("llama", dtype=torch.bfloat16)

    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    alignment = audit.view["kv_alignment"]["kv_aligned"]
    assert alignment["k"]["within_noise"] is False
    assert alignment["v"]["within_noise"] is True
    assert audit.decision.first_slot == 5
    assert audit.view["first_failure"]["text"].endswith("layer 2 / k_cache / slot 5")
