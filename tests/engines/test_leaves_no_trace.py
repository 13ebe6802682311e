"""An audit leaves the caller's model, and the libraries around it, as they were."""

import types
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, DynamicCache

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8]}


def snapshot(model: Any) -> dict[str, Any]:
    return {
        "bits": {name: p.detach().view(torch.uint8).clone() for name, p in model.named_parameters()},
        "storage": {name: p.data_ptr() for name, p in model.named_parameters()},
        "dtypes": {name: b.dtype for name, b in model.named_buffers()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_with_kwargs))
            for m in model.modules()
        ],
        "training": [m.training for m in model.modules()],
        "attention": model.config._attn_implementation,
        "grad": torch.is_grad_enabled(),
        "registered": dict(AttentionInterface._global_mapping),
        "interface": AttentionInterface.__dict__["get_interface"],
        "update": DynamicCache.update,
    }


def assert_same(before: dict[str, Any], after: dict[str, Any]) -> None:
    for name, bits in before["bits"].items():
        assert torch.equal(bits, after["bits"][name]), name
    for key in before.keys() - {"bits"}:
        assert before[key] == after[key], key


@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma3", "gpt2"])
def test_nothing_is_left_behind(name: str) -> None:
    model = tiny_model(name, dtype=torch.bfloat16).train()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    before = snapshot(model)

    kvdrift.audit(model, prompts=PROMPTS)

    assert_same(before, snapshot(model))


def test_nothing_is_left_behind_when_the_model_fails() -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)
    calls = 0

    def fail(module: Any, args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise RuntimeError("planted failure")

    handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
    before = snapshot(model)

    with pytest.raises(kvdrift.CaptureError, match="planted failure"):
        kvdrift.audit(model, prompts=PROMPTS)

    assert_same(before, snapshot(model))
    handle.remove()


def test_a_patched_forward_is_run_and_not_the_class_it_replaced() -> None:
    """A model that the caller has changed on the instance: a copy of the model would lose the change."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    attention = model.model.layers[1].self_attn
    original = attention.forward

    def patched(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out, weights = original(hidden_states, *args, **kwargs)
        return (out * 1.01 if hidden_states.shape[1] == 1 else out), weights

    attention.forward = types.MethodType(patched, attention)

    audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "attn_out")
    assert attention.forward.__func__ is patched


def test_a_registered_attention_function_is_run_as_it_is() -> None:
    """A caller's own attention implementation, faulty on decode only."""

    def attend(
        module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any, scaling: float, **_: Any
    ) -> Any:
        groups = q.shape[1] // k.shape[1]
        decode = k.shape[2] > q.shape[2]
        kk = k.repeat(1, groups, 1, 1) if decode else k.repeat_interleave(groups, 1)
        scores = (q @ kk.transpose(-1, -2)) * scaling
        if q.shape[2] > 1:
            hidden = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, float("-inf"))
        probs = scores.softmax(-1)
        return (probs @ v.repeat_interleave(groups, 1)).transpose(1, 2).contiguous(), probs

    AttentionInterface.register("tiled_at_decode", attend)
    try:
        model = tiny_model("llama", dtype=torch.bfloat16)
        model.config._attn_implementation = "tiled_at_decode"
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)
    finally:
        AttentionInterface._global_mapping.pop("tiled_at_decode")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (0, "attn_scores")
    assert audit.view["environment"]["attention"] == "tiled_at_decode"
