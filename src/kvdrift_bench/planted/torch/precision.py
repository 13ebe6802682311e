"""Faults of precision: stored keys and values in fewer bits or with a wrong scale, softmax, norms and sums in less."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.torch.cache import Rows, only_half, reading
from kvdrift_bench.planted.torch.own import additive, context, handed, repeated, scores_of, softmax_of
from kvdrift_bench.planted.torch.parts import (
    decoder_layers,
    in_attentions,
    is_half,
    needs_cache,
    needs_interface,
    needs_modules,
)
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, Way, in_attention, in_writes
from kvdrift_bench.planted.torch.ways_modules import in_outputs

_SCALE = 0.125


def _through(tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Return the tensor after a visit to narrower dtypes."""
    narrow = tensor
    for dtype in dtypes:
        narrow = narrow.to(dtype)
    return narrow.to(tensor.dtype)


def _both_through(call: CacheCall, *dtypes: torch.dtype) -> Rows:
    return _through(call.keys, *dtypes), _through(call.values, *dtypes)


# ------------------------------------------------------------------------------------------------------ wrong scales


@fault(needs_cache)
@in_writes
def k_scale_lost_on_new_rows(call: CacheCall) -> Rows:
    return call.keys * _SCALE, call.values


@fault(needs_cache)
@reading
def k_scale_lost_on_all_rows(call: CacheCall) -> Rows:
    return call.keys * _SCALE, call.values


@faults({"v_scale_twice": _SCALE, "v_scale_0.9": 0.9, "v_scale_1.001": 1.001}, needs_cache)
def v_scale(factor: float) -> Way:
    @reading
    def scaled(call: CacheCall) -> Rows:
        return call.keys, call.values * factor

    return scaled


@fault(needs_interface, name="v_scale_1.001_in_kernel")
@in_attention
def v_scale_in_kernel(call: AttentionCall) -> Tensor:
    probs = softmax_of(call, scores_of(call))
    return handed(call, probs @ repeated(call)[1].to(probs.dtype) * 1.001)


@fault(needs_cache)
@reading
def k_codes_of_two_bits(call: CacheCall) -> Rows:
    """Codes of three bits, of which two are kept."""
    scale = call.keys.abs().amax(dim=2, keepdim=True) / 4
    code = torch.where(scale > 0, (call.keys / scale).round(), 0.0)
    return (torch.remainder(code + 4, 4) - 4) * scale, call.values


# ------------------------------------------------------------------------------------------------------ fewer bits


@fault(needs_cache)
@reading
def kv_fp8(call: CacheCall) -> Rows:
    return _both_through(call, torch.float32, torch.float8_e4m3fn)


@fault(needs_cache)
@in_writes
def kv_fp8_on_new_rows(call: CacheCall) -> Rows:
    return _both_through(call, torch.float32, torch.float8_e4m3fn)


@fault(needs_cache)
@reading
@only_half
def kv_fp8_beside_half(call: CacheCall) -> Rows:
    return _both_through(call, torch.float32, torch.float8_e5m2)


@fault(needs_cache)
@reading
def kv_int4(call: CacheCall) -> Rows:
    return _in_levels(call.keys, 7), _in_levels(call.values, 7)


def _in_levels(tensor: Tensor, levels: int) -> Tensor:
    """Return the tensor quantised to a grid of `levels` steps to each side of zero, one scale a channel and head."""
    scale = tensor.abs().amax(dim=2, keepdim=True) / levels
    return torch.where(scale > 0, (tensor / scale).round() * scale, tensor)


@fault(needs_cache)
@reading
def kv_fp16(call: CacheCall) -> Rows:
    return _both_through(call, torch.float16)


@fault(needs_cache)
@reading
def kv_bf16(call: CacheCall) -> Rows:
    return _both_through(call, torch.bfloat16)


@fault(needs_cache)
@reading
def kv_bits_reinterpreted(call: CacheCall) -> Rows:
    return _reinterpreted(call.keys), _reinterpreted(call.values)


def _reinterpreted(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).view(torch.int16).view(torch.float16).to(tensor.dtype)


@fault(needs_cache)
@in_writes
@only_half
def kv_truncated_on_new_rows(call: CacheCall) -> Rows:
    return _truncated(call.keys), _truncated(call.values)


def _truncated(tensor: Tensor) -> Tensor:
    """Return the tensor with all but five bits of each significand cut off, towards zero."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 32).trunc() / 32, exponent)


@fault(needs_cache)
@reading
def k_tail_dims_zero(call: CacheCall) -> Rows:
    keys = call.keys.clone()
    keys[..., -(keys.shape[-1] // 4) :] = 0.0
    return keys, call.values


# ------------------------------------------------------------------------------------------------------ softmax


@faults({"softmax_in_bf16": torch.bfloat16, "softmax_in_fp16": torch.float16}, needs_interface)
def softmax_in(dtype: torch.dtype) -> Way:
    @in_attention
    def rounded(call: AttentionCall) -> Tensor:
        return context(call, softmax_of(call, scores_of(call), dtype=dtype))

    return rounded


@fault(needs_interface)
@in_attention
def softmax_native(call: AttentionCall) -> Tensor | None:
    if not is_half(call.query):
        return None
    return context(call, softmax_of(call, scores_of(call), dtype=call.query.dtype))


@fault(needs_interface)
@in_attention
def scores_native(call: AttentionCall) -> Tensor | None:
    """The product of query and key in the dtype of the model, scaled and rounded once more."""
    if not is_half(call.query):
        return None
    whole, cap = call.scale, call.options.get("softcap")
    call.scale, call.options["softcap"] = 1.0, None
    scores = (scores_of(call, masked=False).to(call.query.dtype) * whole).float()
    call.scale, call.options["softcap"] = whole, cap
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = additive(call, scores.dtype)
    return context(call, softmax_of(call, scores if mask is None else scores + mask))


# ------------------------------------------------------------------------------------------------------ sums

_queries = in_attentions("q_proj")


@fault(needs_modules(_queries, "no separate query projection"))
@in_outputs(_queries)
def q_proj_sum_in_half(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
    """A matrix product in eight blocks, whose sum is rounded after each of them."""
    if not is_half(output) or not isinstance(module, nn.Linear):
        return None
    total = torch.zeros_like(output)
    for x, weight in zip(args[0].chunk(8, -1), module.weight.chunk(8, -1), strict=True):
        total = total + nn.functional.linear(x, weight)
    return total if module.bias is None else total + module.bias


@fault()
@in_outputs(decoder_layers)
def residual_in_bf16(module: Any, args: tuple[Any, ...], output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    if hidden.dtype != torch.float16:
        return None
    rounded = _through(hidden, torch.bfloat16)
    return (rounded, *output[1:]) if isinstance(output, tuple) else rounded
