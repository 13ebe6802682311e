"""Experts against float64: in one tensor each, with every implementation, and as a list of modules."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.experts import Routed, are_experts, choice_of, exact_experts
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build import build
from kvdrift_bench.models.tiny import lively_model

# An audit takes about a second.
_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (14, 18, 23)}
MODELS = ("mixtral", "gpt_oss", "qwen3_moe", "deepseek_v3")
WAYS = ("eager", "grouped_mm", "batched_mm")


def along(row: Tensor, size: float) -> Tensor:
    direction = torch.randn(row.shape[-1], generator=torch.Generator().manual_seed(1))
    added: Tensor = size * row.float().norm(dim=-1, keepdim=True) * direction / direction.norm()
    return (row.float() + added).to(row.dtype)


def audited(model: Any) -> Any:
    return kvdrift.audit(model, prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")


def products(audit: Any) -> Any:
    return next(item for item in audit.evidence if item.instrument == "products")


@pytest.mark.parametrize("is_faulty", [True, False])
@pytest.mark.parametrize(
    ("name", "way"),
    [
        pytest.param(name, way, marks=() if (name, way) == ("mixtral", "grouped_mm") else pytest.mark.matrix)
        for name in MODELS
        for way in WAYS
    ],
)
def test_experts_are_a_product_of_their_own(name: str, way: str, is_faulty: bool) -> None:
    model = lively_model(name, torch.bfloat16, experts_implementation=way)
    experts = model.model.layers[1].mlp.experts
    if is_faulty:
        # Experts get a row for each token, without a batch.
        experts.register_forward_hook(lambda _module, _args, out: along(out, 0.03) if len(out) == 1 else out)

    audit = audited(model)

    seen = products(audit)
    assert not seen.detail["without"]
    if is_faulty:
        assert audit.verdict is Verdict.MISMATCH
        assert (audit.first_failure.layer, audit.first_failure.site) == (1, "mlp_out")
        assert seen.detail["guilty"] == "decode"
    else:
        assert audit.exit_code == 0
        assert seen.statistic < 0.6
        assert seen.detail["minimum_by_site"]["mlp_out"] < 0.025


class Expert(nn.Module):
    def __init__(self, experts: Any, index: int) -> None:
        super().__init__()
        gate, up = experts.gate_up_proj[index].data.chunk(2)
        self.gate, self.up, self.down = (
            nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
            for weight in (gate, up, experts.down_proj[index].data)
        )
        for module, weight in ((self.gate, gate), (self.up, up), (self.down, experts.down_proj[index].data)):
            module.weight = nn.Parameter(weight.clone())

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return out


class ListOfExperts(nn.Module):
    """Experts as modules of their own, each of which gets the tokens that were sent to it."""

    def __init__(self, experts: Any) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Expert(experts, index) for index in range(experts.num_experts)])

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self.experts):
            token, slot = torch.where(top_k_index == index)
            if len(token):
                weighted = expert(hidden_states[token]) * top_k_weights[token, slot, None]
                total.index_add_(0, token, weighted.to(total.dtype))
        return total


@pytest.mark.parametrize("is_faulty", [True, False])
def test_each_of_a_list_of_experts_is_judged_on_the_tokens_that_it_got(is_faulty: bool) -> None:
    model = lively_model("mixtral", torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp.experts = ListOfExperts(layer.mlp.experts)
    state = {"one": False}
    block = model.model.layers[1].mlp
    block.register_forward_pre_hook(lambda _module, args: state.update(one=args[0].shape[1] == 1))
    for expert in block.experts.experts if is_faulty else ():
        expert.up.register_forward_hook(lambda _module, _args, out: along(out, 0.015) if state["one"] else out)

    audit = audited(model)

    seen = products(audit)
    assert seen.detail["n_products"] > 3 * (4 + 1 + 3)
    if is_faulty:
        assert audit.verdict is Verdict.MISMATCH
        assert (audit.first_failure.layer, audit.first_failure.site) == (1, "mlp_out")
    else:
        assert audit.exit_code == 0
        assert seen.statistic < 0.6


def test_what_has_no_exact_reference_is_named() -> None:
    """Feed-forward parts that keep their matrices in one tensor, in a way of their own."""

    class Own(nn.Module):
        def __init__(self, mlp: Any) -> None:
            super().__init__()
            parts = (mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data.T)
            self.all = nn.Parameter(torch.stack(parts))

        def forward(self, x: Tensor) -> Tensor:
            gate, up, down = self.all
            out: Tensor = (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down
            return out

    model = lively_model("llama", torch.bfloat16)
    for layer in model.model.layers:
        layer.mlp = Own(layer.mlp)

    seen = products(audited(model))

    assert seen.detail["without"] == [f"layer {index} / mlp_out" for index in range(3)]
    assert "without an exact reference: mlp_out of 3 layers" in seen.text


@torch.no_grad()
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_the_reference_is_what_the_experts_compute_in_float64(name: str) -> None:
    experts = lively_model(name, torch.float64).model.layers[0].mlp.experts
    assert are_experts(experts)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(5, 64, generator=generator, dtype=torch.float64)
    chosen = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in x])
    weights = torch.rand(5, 2, generator=generator, dtype=torch.float64)

    found, spread = exact_experts(experts, x, Routed(chosen, weights))

    assert torch.allclose(found, experts(x, chosen, weights), rtol=1e-10, atol=1e-12)
    assert bool((spread > 0.0).all())
    assert choice_of((x, chosen, weights), 5) is not None
    assert choice_of((x, weights), 5) is None
    assert not are_experts(nn.Linear(2, 2))


@pytest.mark.parametrize("is_faulty", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.matrix)])
def test_a_router_whose_logits_stand_behind_what_becomes_of_them_is_a_product(
    dtype: torch.dtype, is_faulty: bool
) -> None:
    """As in Llama 4, whose router is a linear module that hands on scores and logits."""
    model = build("llama4_text").to(dtype)
    router = next(module for name, module in model.named_modules() if name.endswith("feed_forward.router"))
    forward = router.forward

    def wrong(x: Tensor) -> Any:
        scores, logits = forward(x)
        return (scores, logits) if len(x) > 1 or not is_faulty else (scores, along(logits, 0.1))

    router.forward = wrong
    audit = kvdrift.audit(model, prompts=PROMPTS, span=3)

    (seen, _) = (item for item in audit.evidence if item.instrument == "products")
    assert "router" not in str(seen.detail["coarse"])
    if is_faulty:
        assert seen.supports == "H1"
        assert audit.verdict is Verdict.MISMATCH
    else:
        assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, seen.text)
