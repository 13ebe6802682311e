"""Faults outside of attention: norms, projections, experts, the residual stream, logits."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kvdrift_bench.planted.llamacpp.model import Applies, Grounds
from kvdrift_bench.planted.llamacpp.registry import fault, faults
from kvdrift_bench.planted.llamacpp.ways import Change, Spot, lend_factor


def _needs(name: str, why: str) -> Applies:
    """A file can carry it if its graph has a node, or an operation, of this name."""
    return lambda grounds: None if grounds.has(name) else why


# ------------------------------------------------------------------------------------------------------ norms

_has_norm = _needs("attn_norm", "no norm in front of attention")


@faults({"norm_epsilon_x0.1": 0.1, "norm_epsilon_x10": 10.0, "norm_epsilon_x100": 100.0}, _has_norm)
def norm_epsilon(factor: float) -> Change:
    def change(spot: Spot) -> Iterator[None]:
        if spot.node.op == "RMS_NORM":
            lend_factor(spot, 0, factor)
            yield

    return change


@fault(_has_norm)
def norm_weight_plus_one(spot: Spot) -> Iterator[None]:
    if spot.base == "attn_norm":
        bare = spot.source(0).values().astype(np.float32)
        yield
        spot.write(spot.floats() + bare)


@fault(_has_norm)
def norm_inverse_in_bf16(spot: Spot) -> Iterator[None]:
    if spot.node.op == "RMS_NORM":
        values = spot.source(0).values().astype(np.float64)
        yield
        mean = np.square(values).mean(axis=-1, keepdims=True) + spot.node.parameter(0)
        spot.write(values * (1.0 / np.sqrt(mean)).astype(ml_dtypes.bfloat16).astype(np.float64))


def _skipped(spot: Spot, name: str) -> Iterator[None]:
    """Put what went into the norm into the place of what came out of its weights."""
    memory = spot.tally.memory
    if spot.node.op == "RMS_NORM":
        memory["norm"] = spot.source(0).values().copy()
    elif spot.base == name:
        yield
        spot.write(memory["norm"])


@fault(_needs("Qcur_normed", "no norm of the queries"))
def q_norm_skipped(spot: Spot) -> Iterator[None]:
    yield from _skipped(spot, "Qcur_normed")


@fault(_needs("Kcur_normed", "no norm of the keys"))
def k_norm_skipped(spot: Spot) -> Iterator[None]:
    yield from _skipped(spot, "Kcur_normed")


@fault(_needs("result_norm", "no last norm"))
def final_norm_skipped(spot: Spot) -> Iterator[None]:
    yield from _skipped(spot, "result_norm")


# --------------------------------------------------------------------------------- projections, residual stream, ends


@fault(_needs("kqv_out", "no attention"))
def context_heads_rolled(spot: Spot) -> Iterator[None]:
    weights = spot.node.source(0)
    if spot.node.op == "MUL_MAT" and weights is not None and weights.name.endswith("attn_output.weight"):
        context = spot.source(1)
        spot.lend(context, np.roll(context.values(), context.shape[-1] // 4, axis=-1))
        yield


@fault(_needs("l_out", "no output of a layer"))
def residual_in_bf16(spot: Spot) -> Iterator[None]:
    if spot.base == "l_out":
        yield
        spot.write(spot.node.values().astype(ml_dtypes.bfloat16))


@fault(_needs("inp_scaled", "the embedding is not scaled"))
def embedding_scale_lost(spot: Spot) -> Iterator[None]:
    if spot.base == "inp_scaled":
        spot.lend_parameter(0, 1.0)
        yield


@fault(_needs("result_output", "no logits"), name="logits_scaled_1.01")
def logits_scaled(spot: Spot) -> Iterator[None]:
    if spot.base == "result_output":
        yield
        spot.write(spot.floats() * np.float32(1.01))


def _capped_logits(grounds: Grounds) -> str | None:
    return None if "UNARY" in grounds.nodes.get(None, set()) else "no soft cap on the logits"


@fault(_capped_logits)
def logit_softcap_missing(spot: Spot) -> Iterator[None]:
    if spot.layer is None and spot.node.op == "UNARY":
        before = spot.source(0).values().copy()
        yield
        spot.write(before)


# ------------------------------------------------------------------------------------------------------ experts

_normalises_experts = _needs("ffn_moe_weights_norm", "weights of experts that are not normalised")


@fault(_normalises_experts)
def second_expert_dropped(spot: Spot) -> Iterator[None]:
    if spot.base == "ffn_moe_weights_norm" and spot.node.op == "DIV":
        yield
        weights = spot.floats()
        weights[..., 1:] = 0.0
        spot.write(weights)


@fault(_normalises_experts)
def expert_weights_unnormalised(spot: Spot) -> Iterator[None]:
    if spot.base == "ffn_moe_weights_norm" and spot.node.op == "DIV":
        before = spot.source(0).values().copy()
        yield
        spot.write(before)
