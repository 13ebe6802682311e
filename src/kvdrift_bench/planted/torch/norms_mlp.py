"""Faults around attention: norms, projections, feed-forward modules, experts, embedding and logits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.torch.parts import (
    activations,
    embeddings,
    final_norms,
    fused_projections,
    heads,
    in_attentions,
    is_half,
    layer_norms,
    needs_cache,
    needs_config,
    needs_modules,
    norms,
    output_projections,
    routers,
    wide,
)
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import Way
from kvdrift_bench.planted.torch.ways_modules import in_attribute, in_inputs, in_outputs

Args = tuple[Any, ...]

# ------------------------------------------------------------------------------------------------------ norms


def epsilon_of(module: nn.Module) -> str:
    """Return the name of a norm's epsilon."""
    return next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), "")


def scaled_like(module: Any, normed: Tensor) -> Tensor:
    """Return normed rows times the norm's weight, plus its bias where it has one."""
    weight: Tensor | None = getattr(module, "weight", None)
    if weight is None:
        return normed
    weight = weight.to(normed.dtype)
    if type(module).__name__.startswith("Gemma"):
        weight = 1.0 + weight
    bias: Tensor | None = getattr(module, "bias", None)
    return normed * weight if bias is None else normed * weight + bias.to(normed.dtype)


def _needs_norm(model: nn.Module) -> str | None:
    return needs_cache(model) or needs_modules(layer_norms, "no norm in front of attention")(model)


def _epsilon_names(module: nn.Module) -> Iterable[str]:
    return [name for name in [epsilon_of(module)] if name]


@faults({"norm_epsilon_x0.1": 0.1, "norm_epsilon_x10": 10.0, "norm_epsilon_x100": 100.0}, _needs_norm)
def norm_epsilon(factor: float) -> Way:
    @in_attribute(norms, _epsilon_names)
    def scaled(epsilon: float) -> float:
        return epsilon * factor

    return scaled


@fault(_needs_norm)
@in_outputs(layer_norms)
def norm_in_half(module: Any, args: Args, output: Tensor) -> Tensor | None:
    """Mean, square and root in the dtype of the input."""
    x = args[0]
    if not is_half(x):
        return None
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
    return scaled_like(module, normed).to(output.dtype)


@fault(_needs_norm)
@in_outputs(layer_norms)
def norm_inverse_in_bf16(module: Any, args: Args, output: Tensor) -> Tensor:
    """Divide by a root mean square that was rounded to bf16: the whole row is off by one factor."""
    x = wide(args[0])
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
    return scaled_like(module, x * inverse.to(torch.bfloat16).to(x.dtype)).to(output.dtype)


def _weight_names(module: nn.Module) -> Iterable[str]:
    return ["weight"] if getattr(module, "weight", None) is not None else []


@fault(_needs_norm)
@in_attribute(layer_norms, _weight_names)
def norm_weight_plus_one(weight: Tensor) -> Tensor:
    return weight.detach() + 1.0


_q_norms, _k_norms = in_attentions("q_norm"), in_attentions("k_norm")


@fault(needs_modules(_q_norms, "no norm of queries and keys"))
@in_outputs(_q_norms)
def q_norm_skipped(module: Any, args: Args, output: Tensor) -> Any:
    return args[0].clone()


@fault(needs_modules(_k_norms, "no norm of queries and keys"))
@in_outputs(_k_norms)
def k_norm_skipped(module: Any, args: Args, output: Tensor) -> Any:
    return args[0].clone()


@fault(needs_modules(final_norms, "no norm behind the last layer"))
@in_outputs(final_norms)
def final_norm_skipped(module: Any, args: Args, output: Tensor) -> Any:
    return args[0].clone()


# ------------------------------------------------------------------------------------------------------ projections


def _biased(model: nn.Module) -> list[nn.Module]:
    found = [*in_attentions("q_proj")(model), *fused_projections(model)]
    return [module for module in found if getattr(module, "bias", None) is not None]


@fault(needs_modules(_biased, "projections have no bias"))
@in_attribute(_biased, lambda module: ("bias",))
def projection_bias_lost(bias: Tensor) -> Tensor:
    return torch.zeros_like(bias.detach())


@fault(needs_modules(output_projections, "no output projection"))
@in_inputs(output_projections)
def context_heads_rolled(module: Any, x: Tensor) -> Tensor:
    """Heads of the context in the order 1, 2, ..., 0; a quarter of the width stands for a head."""
    return x.roll(x.shape[-1] // 4, dims=-1)


# Fused projections whose parts lie behind one another; in the others each head has its own three parts.
_in_blocks = in_attentions("qkv_proj", "c_attn")


@fault(needs_modules(_in_blocks, "no fused projection in blocks"))
@in_outputs(_in_blocks)
def fused_projection_split_wrong(module: Any, args: Args, output: Tensor) -> Tensor:
    """The last two equal parts, keys and values, exchanged: the split is told the other order."""
    width = output.shape[-1]
    model_width = args[0].shape[-1]
    part = (width - model_width) // 2
    q, k, v = output[..., : width - 2 * part], output[..., -2 * part : -part], output[..., -part:]
    return torch.cat([q, v, k], dim=-1)


# --------------------------------------------------------------------------------------------- feed-forward modules


@fault(needs_modules(activations, "no activation module of its own"))
@in_outputs(activations)
def activation_approximated(module: Any, args: Args, output: Tensor) -> Tensor:
    x: Tensor = args[0]
    if "silu" in type(module).__name__.lower():
        return x * F.relu6(x + 3.0) / 6.0
    by_tanh = any(word in type(module).__name__.lower() for word in ("tanh", "new", "bloom"))
    return F.gelu(x, approximate="none" if by_tanh else "tanh")


_needs_experts = needs_modules(routers, "no experts")


@fault(_needs_experts)
@in_outputs(routers)
def second_expert_dropped(module: Any, args: Args, output: Any) -> Any:
    logits, weights, chosen = output
    weights = weights.clone()
    weights[..., -1] = 0.0
    return logits, weights, chosen


@fault(_needs_experts)
@in_outputs(routers)
def expert_weights_unnormalised(module: Any, args: Args, output: Any) -> Any:
    logits, weights, chosen = output
    all_weights = torch.softmax(wide(logits), dim=-1)
    return logits, all_weights.gather(-1, chosen).to(weights.dtype), chosen


@fault(_needs_experts)
@in_outputs(routers)
def router_in_half(module: Any, args: Args, output: Any) -> Any:
    logits, weights, chosen = output
    if not is_half(logits):
        return None
    all_weights = torch.softmax(logits, dim=-1, dtype=logits.dtype).gather(-1, chosen)
    total = all_weights.sum(-1, keepdim=True)
    return logits, (all_weights / total).to(weights.dtype), chosen


# ------------------------------------------------------------------------------------------------ embedding and logits


def _needs_embedding_scale(model: nn.Module) -> str | None:
    scaled = getattr(embeddings(model)[0], "scalar_embed_scale", 1.0) != 1.0
    return None if scaled else "the embedding has no scale"


@fault(_needs_embedding_scale)
@in_outputs(embeddings)
def embedding_scale_lost(module: Any, args: Args, output: Tensor) -> Tensor:
    return output / float(getattr(module, "scalar_embed_scale", 1.0))


def _configurations(model: nn.Module) -> list[Any]:
    return [model.config]


@fault(needs_config("final_logit_softcapping", "no soft cap on the logits"))
@in_attribute(_configurations, lambda config: ("final_logit_softcapping",))
def logit_softcap_missing(cap: float) -> None:
    return None


@fault(name="logits_scaled_1.01")
@in_outputs(heads)
def logits_scaled(module: Any, args: Args, output: Tensor) -> Tensor:
    return output * 1.01
