"""Faults around attention: norms, projections, feed-forward modules, experts, embedding and logits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import ALL_DTYPES, HALF_DTYPES, Applies, Fault, anywhere
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
from kvdrift_bench.planted.torch.ways import Way, planted
from kvdrift_bench.planted.torch.ways_modules import in_attribute, in_inputs, in_outputs

_NORM = (Site.ATTN_NORM_OUT, Site.Q_PROJ)
_MLP = (Site.MLP_OUT, Site.LAYER_OUT)
_ROUTED = (Site.ROUTER, Site.MLP_OUT)


def outer_faults() -> tuple[Fault, ...]:
    """Return the faults outside attention; all of them are planted in every layer, or outside the layers."""
    return (*_norms(), *_projections(), *_feed_forward(), *_ends())


def _fault(
    name: str,
    reference: str,
    where: str,
    sites: tuple[Site, ...],
    cause: str,
    way: Way,
    *,
    mechanism: str = "M25",
    dtypes: tuple[str, ...] = ALL_DTYPES,
    keyed: bool = False,
    applies: Applies = anywhere,
    lacking: str | None = None,
) -> Fault:
    return Fault(
        name=name,
        mechanism=mechanism,
        reference=reference,
        where=where,
        sites=sites,
        cause=cause,
        plant=planted(way),
        dtypes=dtypes,
        keyed_to_dtype=keyed,
        applies=applies,
        undiagnosable=lacking,
    )


def epsilon_of(module: nn.Module) -> str:
    """Return the name of a norm's epsilon."""
    return next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), "")


def _norms() -> tuple[Fault, ...]:

    def with_norm(model: nn.Module) -> str | None:
        return needs_cache(model) or needs_modules(layer_norms, "no norm in front of attention")(model)

    def names(module: nn.Module) -> Iterable[str]:
        return [name for name in [epsilon_of(module)] if name]

    def epsilon(name: str, factor: float) -> Fault:
        return _fault(
            name,
            "nntrainer/nntrainer#4318",
            f"The epsilon of every norm, times {factor:g}.",
            _NORM,
            "norm_epsilon",
            in_attribute(norms, names, lambda value: value * factor),
            applies=with_norm,
        )

    def in_half(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """Mean, square and root in the dtype of the input."""
        x = args[0]
        if not is_half(x):
            return None
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
        return scaled_like(module, normed).to(output.dtype)

    def inverse_rounded(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Divide by a root mean square that was rounded to bf16: the whole row is off by one factor."""
        x = wide(args[0])
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
        return scaled_like(module, x * inverse.to(torch.bfloat16).to(x.dtype)).to(output.dtype)

    def other_convention(module: nn.Module) -> Any:
        return ["weight"] if getattr(module, "weight", None) is not None else []

    return (
        epsilon("norm_epsilon_x0.1", 0.1),
        epsilon("norm_epsilon_x10", 10.0),
        epsilon("norm_epsilon_x100", 100.0),
        _fault(
            "norm_in_half",
            "sgl-project/sglang#27540",
            "Every norm in front of attention, computed in the model's own 16-bit dtype.",
            _NORM,
            "norm_dtype",
            in_outputs(layer_norms, in_half),
            dtypes=HALF_DTYPES,
            keyed=True,
            applies=with_norm,
        ),
        _fault(
            "norm_inverse_in_bf16",
            "amd/IRON#139",
            "The factor of every norm in front of attention, rounded to bf16.",
            _NORM,
            "norm_dtype",
            in_outputs(layer_norms, inverse_rounded),
            applies=with_norm,
        ),
        _fault(
            "norm_weight_plus_one",
            "huggingface/transformers#29285",
            "The weight of every norm in front of attention, taken as an offset from one.",
            _NORM,
            "norm_weight_offset",
            in_attribute(layer_norms, other_convention, lambda weight: weight.detach() + 1.0),
            applies=with_norm,
        ),
        *(
            _fault(
                f"{side}_norm_skipped",
                "NVIDIA/Megatron-LM#6459",
                f"The norm of each head's {'query' if side == 'q' else 'key'}, left out in every layer.",
                (site, rope),
                f"{side}_norm_missing",
                in_outputs(in_attentions(f"{side}_norm"), lambda module, args, output: args[0].clone()),
                applies=needs_modules(in_attentions(f"{side}_norm"), "no norm of queries and keys"),
            )
            for side, site, rope in (("q", Site.Q_NORM, Site.Q_ROPE), ("k", Site.K_NORM, Site.K_ROPE))
        ),
    )


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


def _projections() -> tuple[Fault, ...]:
    def biased(model: nn.Module) -> list[nn.Module]:
        found = [*in_attentions("q_proj")(model), *fused_projections(model)]
        return [module for module in found if getattr(module, "bias", None) is not None]

    def rolled(module: Any, x: Tensor) -> Tensor:
        """Heads of the context in the order 1, 2, ..., 0; a quarter of the width stands for a head."""
        return x.roll(x.shape[-1] // 4, dims=-1)

    def in_blocks(model: nn.Module) -> list[nn.Module]:
        """Fused projections whose parts lie behind one another; in the others each head has its own three parts."""
        return list(in_attentions("qkv_proj", "c_attn")(model))

    def exchanged(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The last two equal parts, keys and values, exchanged: the split is told the other order."""
        width = output.shape[-1]
        model_width = args[0].shape[-1]
        part = (width - model_width) // 2
        q, k, v = output[..., : width - 2 * part], output[..., -2 * part : -part], output[..., -part:]
        return torch.cat([q, v, k], dim=-1)

    return (
        _fault(
            "projection_bias_lost",
            "tinygrad/tinygrad#2267",
            "The bias of the query projection of every layer, left out.",
            (Site.Q_PROJ, Site.K_PROJ),
            "projection_bias_missing",
            in_attribute(biased, lambda module: ("bias",), lambda bias: torch.zeros_like(bias.detach())),
            mechanism="M17",
            applies=needs_modules(biased, "projections have no bias"),
        ),
        _fault(
            "context_heads_rolled",
            "pytorch/pytorch#194167",
            "The heads that the output projection of every layer reads, each in the place of the next one.",
            (Site.ATTN_OUT, Site.RESID_ATTN),
            "context_heads_permuted",
            in_inputs(output_projections, rolled),
            mechanism="M17",
            applies=needs_modules(output_projections, "no output projection"),
            lacking="the weights of the output projection",
        ),
        _fault(
            "fused_projection_split_wrong",
            "tinygrad/tinygrad#2267",
            "The fused projection of every layer, its keys taken for values and its values for keys.",
            (Site.K_PROJ, Site.V_PROJ),
            "qkv_split_wrong",
            in_outputs(in_blocks, exchanged),
            mechanism="M17",
            applies=needs_modules(in_blocks, "no fused projection in blocks"),
        ),
    )


def _feed_forward() -> tuple[Fault, ...]:
    plain = needs_modules(activations, "no activation module of its own")
    routed = needs_modules(routers, "no experts")

    def approximated(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x: Tensor = args[0]
        if "silu" in type(module).__name__.lower():
            return x * F.relu6(x + 3.0) / 6.0
        by_tanh = any(word in type(module).__name__.lower() for word in ("tanh", "new", "bloom"))
        return F.gelu(x, approximate="none" if by_tanh else "tanh")

    def dropped(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits, weights, chosen = output
        weights = weights.clone()
        weights[..., -1] = 0.0
        return logits, weights, chosen

    def unnormalised(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits, weights, chosen = output
        all_weights = torch.softmax(wide(logits), dim=-1)
        return logits, all_weights.gather(-1, chosen).to(weights.dtype), chosen

    def in_half(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        logits, weights, chosen = output
        if not is_half(logits):
            return None
        all_weights = torch.softmax(logits, dim=-1, dtype=logits.dtype).gather(-1, chosen)
        total = all_weights.sum(-1, keepdim=True)
        return logits, (all_weights / total).to(weights.dtype), chosen

    def routing(name: str, where: str, cause: str, change: Callable[..., Any], *, keyed: bool = False) -> Fault:
        return _fault(
            name,
            "sgl-project/sglang#27540",
            where,
            _ROUTED,
            cause,
            in_outputs(routers, change),
            dtypes=HALF_DTYPES if keyed else ALL_DTYPES,
            keyed=keyed,
            applies=routed,
            lacking="what each expert gave",
        )

    return (
        _fault(
            "activation_approximated",
            "nntrainer/nntrainer#4318",
            "The activation of every feed-forward module, a cheaper function of nearly the same shape.",
            _MLP,
            "activation_approximated",
            in_outputs(activations, approximated),
            applies=plain,
            lacking="what went into the activation",
        ),
        routing(
            "second_expert_dropped", "The last chosen expert of every layer, not added.", "expert_missing", dropped
        ),
        routing(
            "expert_weights_unnormalised",
            "The weights of the chosen experts of every layer, which no longer add up to one.",
            "expert_weights",
            unnormalised,
        ),
        routing(
            "router_in_half",
            "The weights of the chosen experts of every layer, computed in the model's own 16-bit dtype.",
            "router_dtype",
            in_half,
            keyed=True,
        ),
    )


def _ends() -> tuple[Fault, ...]:
    def unscaled(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output / float(getattr(module, "scalar_embed_scale", 1.0))

    def scaled_embedding(model: nn.Module) -> str | None:
        scaled = getattr(embeddings(model)[0], "scalar_embed_scale", 1.0) != 1.0
        return None if scaled else "the embedding has no scale"

    def configurations(model: nn.Module) -> list[Any]:
        return [model.config]

    return (
        _fault(
            "embedding_scale_lost",
            "huggingface/transformers#29285",
            "The scale of the token embedding, left out.",
            (Site.EMBED_OUT, Site.LAYER_IN),
            "embedding_scale",
            in_outputs(embeddings, unscaled),
            applies=scaled_embedding,
        ),
        _fault(
            "final_norm_skipped",
            "ml-explore/mlx-lm#1189",
            "The norm behind the last layer, left out.",
            (Site.FINAL_NORM_OUT, Site.LOGITS),
            "final_norm_missing",
            in_outputs(final_norms, lambda module, args, output: args[0].clone()),
            applies=needs_modules(final_norms, "no norm behind the last layer"),
        ),
        _fault(
            "logit_softcap_missing",
            "vllm-project/vllm-metal#665",
            "The soft cap of the logits, left out.",
            (Site.LOGITS,),
            "logit_softcap_missing",
            in_attribute(configurations, lambda config: ("final_logit_softcapping",), lambda value: None),
            mechanism="M18",
            applies=needs_config("final_logit_softcapping", "no soft cap on the logits"),
        ),
        _fault(
            "logits_scaled_1.01",
            "NVIDIA/Megatron-LM#1429",
            "The output of the language-modelling head, 1 % too large.",
            (Site.LOGITS,),
            "logit_scale",
            in_outputs(heads, lambda module, args, output: output * 1.01),
            mechanism="M18",
        ),
    )
