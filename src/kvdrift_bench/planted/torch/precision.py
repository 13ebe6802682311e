"""Faults of precision: stored keys and values in fewer bits or with a wrong scale, softmax, norms and sums in less."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import K_OR_V, V_ONLY, Rows, cache_fault, only_half, reading, writing
from kvdrift_bench.planted.torch.model import ABOVE_BF16, ALL_DTYPES, FULL_DTYPES, HALF_DTYPES, Fault
from kvdrift_bench.planted.torch.own import additive, context, handed, repeated, scores_of, softmax_of
from kvdrift_bench.planted.torch.parts import (
    decoder_layers,
    in_attentions,
    is_half,
    needs_cache,
    needs_interface,
    needs_modules,
)
from kvdrift_bench.planted.torch.ways import AttentionCall, AttentionChange, CacheCall, Way, in_attention, planted
from kvdrift_bench.planted.torch.ways_modules import in_outputs

_SCORES = (Site.ATTN_SCORES, Site.ATTN_PROBS)
_SCALE = 0.125


def precision_faults() -> tuple[Fault, ...]:
    """Return the faults of precision, planted in every layer."""
    return (*_quantised(), *_rounded(), *_softmax(), *_sums())


def through(tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    """Return the tensor after a visit to narrower dtypes."""
    narrow = tensor
    for dtype in dtypes:
        narrow = narrow.to(dtype)
    return narrow.to(tensor.dtype)


def in_levels(tensor: Tensor, levels: int) -> Tensor:
    """Return the tensor quantised to a grid of `levels` steps to each side of zero, one scale a channel and head."""
    scale = tensor.abs().amax(dim=2, keepdim=True) / levels
    return torch.where(scale > 0, (tensor / scale).round() * scale, tensor)


def truncated(tensor: Tensor) -> Tensor:
    """Return the tensor with all but five bits of each significand cut off, towards zero."""
    mantissa, exponent = torch.frexp(tensor)
    return torch.ldexp((mantissa * 32).trunc() / 32, exponent)


def _each(change: Callable[[Tensor], Tensor]) -> Callable[[CacheCall], Rows]:
    return lambda call: (change(call.keys), change(call.values))


def _values(change: Callable[[Tensor], Tensor]) -> Callable[[CacheCall], Rows]:
    return lambda call: (call.keys, change(call.values))


def _quantised() -> tuple[Fault, ...]:
    def fault(
        name: str,
        reference: str,
        where: str,
        cause: str,
        way: Way,
        sites: tuple[Site, ...] = K_OR_V,
        dtypes: tuple[str, ...] = ALL_DTYPES,
    ) -> Fault:
        return cache_fault(name, "M19", reference, where, cause, way, sites=sites, dtypes=dtypes)

    def scaled_context(call: AttentionCall) -> Tensor:
        probs = softmax_of(call, scores_of(call))
        return handed(call, probs @ repeated(call)[1].to(probs.dtype) * 1.001)

    def two_bits(keys: Tensor) -> Tensor:
        """Codes of three bits, of which two are kept."""
        scale = keys.abs().amax(dim=2, keepdim=True) / 4
        code = torch.where(scale > 0, (keys / scale).round(), 0.0)
        return (torch.remainder(code + 4, 4) - 4) * scale

    return (
        fault(
            "k_scale_lost_on_new_rows",
            "NVIDIA/TensorRT-LLM#16916",
            f"New keys of every layer, stored without their scale of {_SCALE}.",
            "k_scale_lost",
            writing(None, lambda call: (call.keys * _SCALE, call.values)),
        ),
        fault(
            "k_scale_lost_on_all_rows",
            "flashinfer-ai/flashinfer#1023",
            f"All keys of every layer, read without their scale of {_SCALE}.",
            "k_scale_lost",
            reading(None, lambda call: (call.keys * _SCALE, call.values)),
        ),
        fault(
            "v_scale_twice",
            "vllm-project/vllm#42580",
            f"All values of every layer, read with their scale of {_SCALE} taken twice.",
            "v_scale",
            reading(None, _values(lambda values: values * _SCALE)),
            V_ONLY,
        ),
        fault(
            "v_scale_0.9",
            "vllm-project/vllm#27232",
            "All values of every layer, 10 % too small.",
            "v_scale",
            reading(None, _values(lambda values: values * 0.9)),
            V_ONLY,
        ),
        fault(
            "v_scale_1.001",
            "vllm-project/vllm#27232",
            "All values of every layer, 0.1 % too large.",
            "v_scale",
            reading(None, _values(lambda values: values * 1.001)),
            V_ONLY,
            ABOVE_BF16,  # the step from one bf16 number to the next is larger
        ),
        Fault(
            name="v_scale_1.001_in_kernel",
            mechanism="M19",
            reference="vllm-project/vllm#27232",
            where="The output of attention of every layer, 0.1 % too large before it is rounded.",
            sites=(Site.ATTN_CTX, Site.ATTN_OUT),
            cause="v_scale",
            plant=planted(in_attention(scaled_context)),
            applies=needs_interface,
            amount=1e-3,
        ),
        fault(
            "k_codes_of_two_bits",
            "vllm-project/vllm#38479",
            "All keys of every layer, their 3-bit codes read as 2-bit codes.",
            "kv_codes_cut",
            reading(None, lambda call: (two_bits(call.keys), call.values)),
        ),
    )


def _rounded() -> tuple[Fault, ...]:
    fp8 = torch.float8_e4m3fn

    def fault(
        name: str,
        reference: str,
        where: str,
        cause: str,
        way: Way,
        dtypes: tuple[str, ...] = ALL_DTYPES,
        keyed: bool = False,
        sites: tuple[Site, ...] = K_OR_V,
    ) -> Fault:
        return Fault(
            name=name,
            mechanism="M20",
            reference=reference,
            where=where,
            sites=sites,
            cause=cause,
            plant=planted(way),
            dtypes=dtypes,
            keyed_to_dtype=keyed,
            applies=needs_cache,
        )

    def reinterpreted(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16).view(torch.int16).view(torch.float16).to(tensor.dtype)

    def without_tail(keys: Tensor) -> Tensor:
        keys = keys.clone()
        keys[..., -(keys.shape[-1] // 4) :] = 0.0
        return keys

    return (
        fault(
            "kv_fp8",
            "FlashML-org/FreeToken#103",
            "All rows of every layer, rounded to fp8 (e4m3).",
            "kv_rounded_fp8",
            reading(None, _each(partial(_fp8, dtype=fp8))),
        ),
        fault(
            "kv_fp8_on_new_rows",
            "vllm-project/vllm#54338",
            "New rows of every layer, rounded to fp8 (e4m3) as they are stored.",
            "kv_rounded_fp8",
            writing(None, _each(partial(_fp8, dtype=fp8))),
        ),
        fault(
            "kv_fp8_beside_half",
            "flashinfer-ai/flashinfer#5085",
            "All rows of every layer, rounded to fp8 (e5m2) if the model runs in 16 bits.",
            "kv_rounded_fp8",
            reading(None, only_half(_each(partial(_fp8, dtype=torch.float8_e5m2)))),
            HALF_DTYPES,
            keyed=True,
        ),
        fault(
            "kv_int4",
            "ggml-org/llama.cpp#23717",
            "All rows of every layer, rounded to 15 levels a channel.",
            "kv_rounded_int4",
            reading(None, _each(partial(in_levels, levels=7))),
        ),
        fault(
            "kv_fp16",
            "ggml-org/llama.cpp#23717",
            "All rows of every layer, rounded to fp16.",
            "kv_rounded_fp16",
            reading(None, _each(partial(through_half, dtype=torch.float16))),
            # What bf16 holds, fp16 holds as well, unless it is too small.
            FULL_DTYPES,
        ),
        fault(
            "kv_bf16",
            "ggml-org/llama.cpp#23717",
            "All rows of every layer, rounded to bf16.",
            "kv_rounded_bf16",
            reading(None, _each(partial(through_half, dtype=torch.bfloat16))),
            ABOVE_BF16,
        ),
        fault(
            "kv_bits_reinterpreted",
            "vllm-project/vllm#54338",
            "All rows of every layer, stored as bf16 and read as fp16.",
            "kv_bits_reinterpreted",
            reading(None, _each(reinterpreted)),
        ),
        fault(
            "kv_truncated_on_new_rows",
            "FlashML-org/FreeToken#103",
            "New rows of every layer, cut to five significant bits instead of rounded, if the model runs in 16 bits.",
            "kv_truncated",
            writing(None, only_half(_each(truncated))),
            HALF_DTYPES,
            keyed=True,
        ),
        fault(
            "k_tail_dims_zero",
            "flashinfer-ai/flashinfer#5085",
            "The last quarter of each key of every layer, not loaded and zero.",
            "k_tail_dims_lost",
            reading(None, lambda call: (without_tail(call.keys), call.values)),
        ),
    )


def _fp8(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return through(tensor, torch.float32, dtype)


def through_half(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor after a visit to a 16-bit dtype."""
    return through(tensor, dtype)


def _softmax() -> tuple[Fault, ...]:
    def fault(
        name: str,
        reference: str,
        where: str,
        cause: str,
        change: AttentionChange,
        dtypes: tuple[str, ...] = ALL_DTYPES,
        keyed: bool = False,
    ) -> Fault:
        return Fault(
            name=name,
            mechanism="M25",
            reference=reference,
            where=where,
            sites=_SCORES,
            cause=cause,
            plant=planted(in_attention(change)),
            dtypes=dtypes,
            keyed_to_dtype=keyed,
            applies=needs_interface,
        )

    def softmax_in(call: AttentionCall, *, dtype: torch.dtype) -> Tensor:
        return context(call, softmax_of(call, scores_of(call), dtype=dtype))

    def softmax_native(call: AttentionCall) -> Tensor | None:
        return softmax_in(call, dtype=call.query.dtype) if is_half(call.query) else None

    def scores_in_half(call: AttentionCall) -> Tensor | None:
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

    return (
        fault(
            "softmax_in_bf16",
            "huggingface/transformers#17437",
            "The softmax of every layer, computed in bf16.",
            "softmax_dtype",
            partial(softmax_in, dtype=torch.bfloat16),
        ),
        fault(
            "softmax_in_fp16",
            "huggingface/transformers#17437",
            "The softmax of every layer, computed in fp16.",
            "softmax_dtype",
            partial(softmax_in, dtype=torch.float16),
        ),
        fault(
            "softmax_native",
            "huggingface/transformers#17437",
            "The softmax of every layer, computed in the model's own 16-bit dtype.",
            "softmax_dtype",
            softmax_native,
            HALF_DTYPES,
            keyed=True,
        ),
        fault(
            "scores_native",
            "huggingface/transformers#28673",
            "The scores of every layer, rounded to the model's own 16-bit dtype before and after scaling.",
            "scores_dtype",
            scores_in_half,
            HALF_DTYPES,
            keyed=True,
        ),
    )


def _sums() -> tuple[Fault, ...]:
    def accumulated(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        """A matrix product in eight blocks, whose sum is rounded after each of them."""
        if not is_half(output) or not isinstance(module, nn.Linear):
            return None
        total = torch.zeros_like(output)
        for x, weight in zip(args[0].chunk(8, -1), module.weight.chunk(8, -1), strict=True):
            total = total + nn.functional.linear(x, weight)
        return total if module.bias is None else total + module.bias

    def residual(module: Any, args: tuple[Any, ...], output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.dtype != torch.float16:
            return None
        rounded = through(hidden, torch.bfloat16)
        return (rounded, *output[1:]) if isinstance(output, tuple) else rounded

    queries = in_attentions("q_proj")
    return (
        Fault(
            name="q_proj_sum_in_half",
            mechanism="M25",
            reference="amd/IRON#139",
            where="The query projection of every layer, its sum rounded to 16 bits after each eighth.",
            sites=(Site.Q_PROJ, Site.Q_ROPE),
            cause="matmul_dtype",
            undiagnosable="the weights of the projection",
            plant=planted(in_outputs(queries, accumulated)),
            dtypes=HALF_DTYPES,
            keyed_to_dtype=True,
            applies=needs_modules(queries, "no separate query projection"),
        ),
        Fault(
            name="residual_in_bf16",
            mechanism="M25",
            reference="sgl-project/sglang#27540",
            where="The output of every layer, rounded to bf16 in a model that runs in fp16.",
            sites=(Site.LAYER_OUT, Site.LAYER_IN),
            cause="residual_dtype",
            plant=planted(in_outputs(decoder_layers, residual)),
            dtypes=("float16",),
            keyed_to_dtype=True,
        ),
    )
