"""A model whose parameters are float32 and whose products run in bfloat16 is judged by what bfloat16 rounds."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import kvdrift
from kvdrift_bench.models.tiny import lively_model

PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12], "b": [11, 23, 4, 40, 9, 31, 7]}


def half() -> AbstractContextManager[Any]:
    return torch.autocast("cpu", torch.bfloat16)


def casting(model: Any) -> Any:
    """Put autocast into the model's own forward."""
    forward = model.forward

    @functools.wraps(forward)
    def cast(*args: Any, **options: Any) -> Any:
        with half():
            return forward(*args, **options)

    model.forward = cast
    return model


@pytest.mark.parametrize(("inside", "ladder"), [(False, "model"), (True, "off")])
def test_autocast_outside_and_inside_of_forward_is_clean(inside: bool, ladder: Any) -> None:
    model = lively_model("llama", torch.float32)
    with nullcontext() if inside else half():
        audit = kvdrift.audit(casting(model) if inside else model, prompts=PROMPTS, ladder=ladder)
    assert audit.exit_code == 0, (audit.first_failure, audit.decision.reasons)
    (text,) = [caveat.text for caveat in audit.caveats if caveat.code == "COMPUTED_IN"]
    assert text.startswith("computed in bfloat16: the parameters are float32, and ")
    assert "v_proj" in text
    assert "attn_norm_out" not in text


@pytest.mark.parametrize("ladder", ["model", "off"])
def test_a_fault_under_autocast_is_found(ladder: Any) -> None:
    model = lively_model("llama", torch.float32)
    down = model.model.layers[1].mlp.down_proj
    forward = down.forward
    down.forward = lambda x: forward(x) * (1.1 if x.shape[-2] == 1 else 1.0)
    with half():
        audit = kvdrift.audit(model, prompts=PROMPTS, ladder=ladder)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "mlp_out")


def test_a_plain_float32_model_has_no_such_caveat() -> None:
    audit = kvdrift.audit(lively_model("llama", torch.float32), prompts={"b": PROMPTS["b"]}, span=1)
    assert "COMPUTED_IN" not in {caveat.code for caveat in audit.caveats}


def test_autocast_of_decode_alone_is_told_by_the_size_of_its_errors() -> None:
    model = lively_model("llama", torch.float32)
    forward = model.model.forward

    def cast(*args: Any, **options: Any) -> Any:
        ids: Any = options.get("input_ids", args[0] if args else None)
        with half() if ids.shape[-1] == 1 else nullcontext():
            return forward(*args, **options)

    model.model.forward = cast
    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, "q_proj")  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "product_wrong"
    assert "its errors are as large as rounding to bfloat16 makes them" in audit.diagnosis.text
