"""Every planted fault is found at its true address, on every architecture that can carry it."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import Fault, corpus_for
from kvdrift_bench.planted.torch.model import Plant
from tests.detectors.test_diagnosis import NAMED
from tests.support.audits import by_architecture
from tests.support.carriers import N_LAYERS, PROMPTS, carrier_of, one_thread
from tests.support.matrix import first_of_each, further
from tests.support.tiny import tiny_model

CORPUS = {fault.name: fault for fault in corpus_for(N_LAYERS)}
# test_diagnosis.py finds the others, in the same audit that names their cause.
RUNNABLE = [
    name
    for name, fault in CORPUS.items()
    if fault.needs is None and not fault.keyed_to_dtype and name not in {named for _, named, *_ in NAMED}
]

# One fault of each way of planting, for what must hold on all architectures, modes and dtypes.
EVERYWHERE = [
    "position_plus_one",
    "all_scales_1.001",
    "heads_tiled",
    "slot_aliased",
    "norm_epsilon_x0.1",
]
ARCHITECTURES = [
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


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def audited(plant: Plant, model: Any, **options: Any) -> Audit:
    """Audit a model with a fault in it, and make sure that the fault was committed."""
    with plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, **options)
    assert commits.count > 0
    assert commits.changed > 0
    return audit


def is_found(audit: Audit, fault: Fault, model: Any) -> bool:
    """Whether the audit says MISMATCH and names the fault's own layer and site."""
    return audit.verdict is Verdict.MISMATCH and audit.exit_code == 1 and fault.is_at(audit.first_failure, model)


@pytest.mark.parametrize("name", first_of_each(RUNNABLE, lambda name: CORPUS[name].sites))
def test_a_fault_is_found_where_it_was_planted(name: str) -> None:
    fault = CORPUS[name]
    _, model = carrier_of(fault)

    audit = audited(fault.plant, model)

    assert is_found(audit, fault, model), f"{audit.verdict} at {audit.first_failure}, planted at {fault.sites}"


@pytest.mark.parametrize("architecture", by_architecture(ARCHITECTURES, core=("gemma2",)))
def test_a_fault_is_found_on_every_architecture(architecture: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)
    carried = [CORPUS[name] for name in EVERYWHERE if CORPUS[name].applies(model) is None]
    assert len(carried) >= len(EVERYWHERE) - 1

    missed = []
    for fault in carried:
        audit = audited(fault.plant, model)
        if not is_found(audit, fault, model):
            missed.append(f"{fault.name}: {audit.verdict} at {audit.first_failure}")

    assert missed == []


@pytest.mark.parametrize("mode", ["as_designed", "kv_aligned"])
@pytest.mark.parametrize("name", [EVERYWHERE[0], *further(*EVERYWHERE[1:])])
def test_each_mode_finds_it_alone(mode: str, name: str) -> None:
    fault = CORPUS[name]
    model = tiny_model("llama", dtype=torch.bfloat16)

    audit = audited(fault.plant, model, mode=mode)

    assert is_found(audit, fault, model)
    assert audit.kind == "semantic"


@pytest.mark.parametrize("attention", [*further("eager"), "sdpa"])
@pytest.mark.parametrize("dtype", [*further(torch.float16, torch.float32), torch.float64], ids=str)
def test_a_fault_is_found_at_any_dtype_and_kernel(dtype: torch.dtype, attention: str) -> None:
    fault = CORPUS["all_scales_1.001"]
    model = tiny_model("llama", dtype=dtype, attention=attention)

    assert is_found(audited(fault.plant, model), fault, model)


@pytest.mark.parametrize("name", [EVERYWHERE[0], *further(*EVERYWHERE[1:])])
def test_the_same_model_is_clean_again_once_the_fault_is_gone(name: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    with CORPUS[name].plant(model):
        pass

    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


def test_the_slot_of_an_aliased_row_is_named() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)

    audit = audited(CORPUS["slot_aliased"].plant, model)

    alignment = audit.view["kv_alignment"]["kv_aligned"]
    assert alignment["k"]["within_noise"] is False
    assert alignment["v"]["within_noise"] is True
    assert audit.decision.first_slot == 5
    assert audit.view["first_failure"]["text"].endswith("layer 2 / k_cache / slot 5")
