"""Faults outside of attention: norms, projections, experts, the residual stream, logits."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.llamacpp.model import Applies, Grounds, LlamaFault, llama_fault
from kvdrift_bench.planted.llamacpp.ways import Change, Spot

_NORM = (Site.ATTN_NORM_OUT, Site.Q_PROJ)
_ROUTED = (Site.ROUTER, Site.MLP_OUT)


def module_faults() -> tuple[LlamaFault, ...]:
    """Return the faults outside of attention, planted in every layer that has the module."""
    return (*_norms(), *_head_norms(), *_outputs(), *_experts())


def _needs(name: str, why: str) -> Applies:
    """A file can carry it if its graph has a node, or an operation, of this name."""
    return lambda grounds: None if grounds.has(name) else why


def _norms() -> tuple[LlamaFault, ...]:
    has_norm = _needs("attn_norm", "no norm in front of attention")

    def epsilon(factor: float) -> Change:
        def change(spot: Spot) -> Iterator[None]:
            if spot.node.op == "RMS_NORM":
                spot.lend_parameter(0, spot.node.parameter(0) * factor)
                yield

        return change

    def fault(factor: float) -> LlamaFault:
        return llama_fault(
            f"norm_epsilon_x{factor:g}",
            "M25",
            "nntrainer/nntrainer#4318",
            f"The epsilon of every norm, times {factor:g}.",
            "norm_epsilon",
            epsilon(factor),
            sites=_NORM,
            applies=has_norm,
        )

    def plus_one(spot: Spot) -> Iterator[None]:
        if spot.base == "attn_norm":
            bare = spot.source(0).values().astype(np.float32)
            yield
            spot.write(spot.floats() + bare)

    def inverse(spot: Spot) -> Iterator[None]:
        """What the norm divides by, rounded."""
        if spot.node.op == "RMS_NORM":
            values = spot.source(0).values().astype(np.float64)
            yield
            mean = np.square(values).mean(axis=-1, keepdims=True) + spot.node.parameter(0)
            spot.write(values * (1.0 / np.sqrt(mean)).astype(ml_dtypes.bfloat16).astype(np.float64))

    return (
        fault(0.1),
        fault(10.0),
        fault(100.0),
        llama_fault(
            "norm_weight_plus_one",
            "M25",
            "huggingface/transformers#29285",
            "The weight of every norm in front of attention, read as if one were to be added.",
            "norm_weight_offset",
            plus_one,
            sites=_NORM,
            applies=has_norm,
        ),
        llama_fault(
            "norm_inverse_in_bf16",
            "M25",
            "amd/IRON#139",
            "What every norm divides by, rounded to bf16.",
            "norm_dtype",
            inverse,
            sites=_NORM,
            applies=has_norm,
        ),
    )


def _head_norms() -> tuple[LlamaFault, ...]:
    def skipped(name: str) -> Change:
        """Put what went into the norm into the place of what came out of its weights."""

        def change(spot: Spot) -> Iterator[None]:
            memory = spot.tally.memory
            if spot.node.op == "RMS_NORM":
                memory["norm"] = spot.source(0).values().copy()
            elif spot.base == name:
                yield
                spot.write(memory["norm"])

        return change

    def fault(name: str, node: str, sites: tuple[Site, ...], cause: str, which: str) -> LlamaFault:
        return llama_fault(
            name,
            "M25",
            "NVIDIA/Megatron-LM#6459",
            f"The norm of the {which} of every layer, left out.",
            cause,
            skipped(node),
            sites=sites,
            applies=_needs(node, f"no norm of the {which}"),
        )

    return (
        fault("q_norm_skipped", "Qcur_normed", (Site.Q_NORM, Site.Q_ROPE), "q_norm_missing", "queries"),
        fault("k_norm_skipped", "Kcur_normed", (Site.K_NORM, Site.K_ROPE), "k_norm_missing", "keys"),
        llama_fault(
            "final_norm_skipped",
            "M25",
            "ml-explore/mlx-lm#1189",
            "The last norm, left out.",
            "final_norm_missing",
            skipped("result_norm"),
            sites=(Site.FINAL_NORM_OUT, Site.LOGITS),
            applies=_needs("result_norm", "no last norm"),
        ),
    )


def _outputs() -> tuple[LlamaFault, ...]:
    def scaled(spot: Spot) -> Iterator[None]:
        if spot.base == "result_output":
            yield
            spot.write(spot.floats() * np.float32(1.01))

    def uncapped(spot: Spot) -> Iterator[None]:
        if spot.layer is None and spot.node.op == "UNARY":
            before = spot.source(0).values().copy()
            yield
            spot.write(before)

    def rolled(spot: Spot) -> Iterator[None]:
        """Heads of the context in another order, where the output projection reads them."""
        weights = spot.node.source(0)
        if spot.node.op == "MUL_MAT" and weights is not None and weights.name.endswith("attn_output.weight"):
            context = spot.source(1)
            spot.lend(context, np.roll(context.values(), context.shape[-1] // 4, axis=-1))
            yield

    def in_bf16(spot: Spot) -> Iterator[None]:
        if spot.base == "l_out":
            yield
            spot.write(spot.node.values().astype(ml_dtypes.bfloat16))

    def unscaled(spot: Spot) -> Iterator[None]:
        if spot.base == "inp_scaled":
            spot.lend_parameter(0, 1.0)
            yield

    def capped(grounds: Grounds) -> str | None:
        return None if "UNARY" in grounds.nodes.get(None, set()) else "no soft cap on the logits"

    return (
        llama_fault(
            "context_heads_rolled",
            "M17",
            "pytorch/pytorch#194167",
            "The heads of the context of every layer, a quarter further where the output projection reads them.",
            "context_heads_permuted",
            rolled,
            sites=(Site.ATTN_OUT, Site.RESID_ATTN),
            applies=_needs("kqv_out", "no attention"),
            undiagnosable="the weights of the output projection",
        ),
        llama_fault(
            "residual_in_bf16",
            "M25",
            "sgl-project/sglang#27540",
            "The residual stream behind every layer, rounded to bf16.",
            "residual_dtype",
            in_bf16,
            sites=(Site.LAYER_OUT, Site.LAYER_IN),
            applies=_needs("l_out", "no output of a layer"),
        ),
        llama_fault(
            "embedding_scale_lost",
            "M25",
            "huggingface/transformers#29285",
            "The scale of the embedding, left out.",
            "embedding_scale",
            unscaled,
            sites=(Site.EMBED_OUT, Site.LAYER_IN),
            applies=_needs("inp_scaled", "the embedding is not scaled"),
            also=("scaled",),
        ),
        llama_fault(
            "logits_scaled_1.01",
            "M18",
            "NVIDIA/Megatron-LM#1429",
            "The logits, 1 % too large.",
            "logit_scale",
            scaled,
            sites=(Site.LOGITS,),
            applies=_needs("result_output", "no logits"),
            amount=0.01,
        ),
        llama_fault(
            "logit_softcap_missing",
            "M18",
            "vllm-project/vllm-metal#665",
            "The soft cap of the logits, left out.",
            "logit_softcap_missing",
            uncapped,
            sites=(Site.LOGITS,),
            applies=capped,
        ),
    )


def _experts() -> tuple[LlamaFault, ...]:
    def second_dropped(spot: Spot) -> Iterator[None]:
        if spot.base == "ffn_moe_weights_norm" and spot.node.op == "DIV":
            yield
            weights = spot.floats()
            weights[..., 1:] = 0.0
            spot.write(weights)

    def unnormalised(spot: Spot) -> Iterator[None]:
        if spot.base == "ffn_moe_weights_norm" and spot.node.op == "DIV":
            before = spot.source(0).values().copy()
            yield
            spot.write(before)

    def fault(name: str, where: str, cause: str, change: Change, applies: Applies) -> LlamaFault:
        return llama_fault(
            name,
            "M25",
            "sgl-project/sglang#27540",
            where,
            cause,
            change,
            sites=_ROUTED,
            applies=applies,
            undiagnosable="what each expert gave",
        )

    normalised = _needs("ffn_moe_weights_norm", "weights of experts that are not normalised")
    return (
        fault(
            "second_expert_dropped",
            "All but the first of the chosen experts of every layer, not added.",
            "expert_missing",
            second_dropped,
            normalised,
        ),
        fault(
            "expert_weights_unnormalised",
            "The weights of the chosen experts, not brought to a sum of one.",
            "expert_weights",
            unnormalised,
            normalised,
        ),
    )
