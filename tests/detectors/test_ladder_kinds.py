"""What each kind of ladder finds: the whole model, one layer at a time, and none."""

from typing import Any

import pytest
import torch

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.planted.torch import corpus_for
from tests.support.audits import CORE, by_architecture, clean_audit
from tests.support.carriers import N_LAYERS, carrier_of
from tests.support.matrix import first_of_each, further
from tests.support.tiny import tiny_model

CORPUS = {fault.name: fault for fault in corpus_for(N_LAYERS)}
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "q": list(range(40, 49)), "r": list(range(70, 99))}

# The first two are planted in what the model computes for all layers: positions, and tables of angles.
INSIDE = ["position_plus_one", "position_zero", "all_scales_1.001", "heads_tiled", "slot_aliased", "norm_epsilon_x0.1"]
OUTSIDE = [
    fault.name
    for fault in CORPUS.values()
    if fault.needs is None
    and not fault.keyed_to_dtype
    and str(fault.sites[0]) in ("embed_out", "final_norm_out", "logits")
]
# Faults that half precision shows by itself, at the sites that have equal inputs.
AT_NATIVE = ["position_plus_one", "heads_tiled", "slot_aliased", "kv_fp8"]


def found(audit: Any, name: str, model: Any) -> bool:
    return audit.verdict is Verdict.MISMATCH and CORPUS[name].is_at(audit.first_failure, model)


def kind_of(name: str) -> str:
    """Whether a fault is planted in what all layers share, in a layer, or outside the layers."""
    return "outside" if name in OUTSIDE else "shared" if name in INSIDE[:2] else "inside"


@pytest.mark.parametrize("name", first_of_each([*INSIDE, *OUTSIDE], kind_of))
def test_a_fault_is_found_where_it_was_planted_one_layer_at_a_time(name: str) -> None:
    fault = CORPUS[name]
    _, model = carrier_of(fault, "bfloat16")
    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"]}, span=2, ladder="layer")

    assert commits.changed > 0
    assert found(audit, name, model), f"{audit.verdict} at {audit.first_failure}, planted at {fault.sites}"
    assert audit.kind == "semantic"


MORE = ("gemma3", "falcon_h1", "bamba", "zamba2")


# That one layer at a time computes the same bits is shown for every architecture by test_streaming.py.
@pytest.mark.parametrize("architecture", by_architecture((*CORE, *MORE), core=("llama", "mamba2")))
def test_both_kinds_of_ladder_say_the_same_of_a_clean_model(architecture: str) -> None:
    kinds: tuple[LadderChoice, ...] = ("model", "layer")
    views = [clean_audit(architecture, "bfloat16", ladder=kind).view for kind in kinds]

    assert views[0]["verdict"] == views[1]["verdict"]
    # docs/findings/bamba_positions_on_a_cache.md and zamba2_time_step_of_a_decode_step.md
    assert (views[0]["verdict"] == "MISMATCH") == (architecture in ("bamba", "zamba2"))
    assert views[0]["instruments"] == views[1]["instruments"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float16)], ids=str)
@pytest.mark.parametrize("name", [*AT_NATIVE[:2], *further(*AT_NATIVE[2:])])
def test_a_fault_is_found_without_a_ladder(name: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    with CORPUS[name].plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, ladder="off")

    assert commits.changed > 0
    assert found(audit, name, model), f"{audit.verdict} at {audit.first_failure}"
    assert audit.kind is None  # without a ladder nobody knows whether it would stay at float64


@pytest.mark.parametrize(
    ("dtype", "attention"), [(torch.bfloat16, "sdpa"), *further((torch.float16, "eager"))], ids=str
)
@pytest.mark.parametrize(
    "architecture", by_architecture(["llama", "qwen3", "gpt2", "gpt_neox", "mixtral", "phi3"], core=("llama", "gpt2"))
)
def test_a_clean_model_passes_without_a_ladder(architecture: str, dtype: torch.dtype, attention: str) -> None:
    audit = kvdrift.audit(tiny_model(architecture, dtype=dtype, attention=attention), prompts=PROMPTS, ladder="off")
    control = next(item for item in audit.evidence if item.instrument == "positive_control")

    assert audit.verdict in (Verdict.STRUCTURAL_DRIFT, Verdict.EXACT)
    assert control.valid
    assert control.minimum_detectable == {torch.bfloat16: 2.0**-5, torch.float16: 2.0**-8}[dtype]
    assert "LADDER_OFF" in {caveat.code for caveat in audit.caveats}
    assert audit.view["coverage"]["rungs"] == [str(dtype).removeprefix("torch.")]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "the native instruments could not judge kv_aligned: float32 accumulates"),
        ({"mode": "as_designed"}, "positive control not seen"),
    ],
)
def test_what_the_native_instruments_cannot_judge_is_no_pass(options: dict[str, Any], reason: str) -> None:
    model = tiny_model("llama", dtype=options.pop("dtype", torch.bfloat16))
    audit = kvdrift.audit(model, prompts=PROMPTS, ladder="off", **options)

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert reason in audit.decision.reasons[0]  # what follows from it comes after it
    assert audit.view["recommendations"][0].startswith("Run it again with the precision ladder (--ladder model")
    assert not any("Settle this first" in text for text in audit.view["recommendations"])


def test_a_control_that_is_not_seen_makes_the_audit_inconclusive(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of half a rounding changes nothing, so it is the one that must be missed."""
    monkeypatch.setattr("kvdrift.capture.control.size_at_native", lambda *given: 2.0**-12)
    audit = kvdrift.audit(tiny_model("llama", dtype=torch.bfloat16), prompts=PROMPTS, ladder="off")

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert any("was not seen" in reason for reason in audit.decision.reasons)
