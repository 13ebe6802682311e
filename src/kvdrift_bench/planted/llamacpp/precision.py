"""Faults of precision: stored keys and values with a wrong scale or in fewer bits, softmax and residuals in less."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.llamacpp.attention import SCORES, apart, attends, attention_fault
from kvdrift_bench.planted.llamacpp.cache import K_OR_V, V_ONLY, Rows, cache_fault, each, packed, reading, with_cells
from kvdrift_bench.planted.llamacpp.model import Applies, LlamaFault
from kvdrift_bench.planted.llamacpp.ways import Change, Floats, Spot

_SCALE = 0.125


def precision_faults() -> tuple[LlamaFault, ...]:
    """Return the faults of precision, planted in every layer."""
    return (*_scales(), *_rounded(), *_softmax())


def _scales() -> tuple[LlamaFault, ...]:
    def times(factor: float) -> Rows:
        return lambda spot, rows: rows * np.float32(factor)

    def new_row(spot: Spot, rows: Floats) -> Floats:
        return with_cells(rows, -1, rows[-1] * np.float32(_SCALE))

    def fault(
        name: str, reference: str, where: str, cause: str, change: Change, sites: tuple[Site, ...] = V_ONLY
    ) -> LlamaFault:
        return cache_fault(name, "M19", reference, where, cause, change, sites=sites)

    def slightly(spot: Spot, rows: Floats) -> Floats:
        return with_cells(rows, -1, rows[-1] * np.float32(1.05))

    return (
        fault(
            "k_scale_lost_on_new_rows",
            "NVIDIA/TensorRT-LLM#16916",
            f"The new key of every layer, stored without its scale of {_SCALE}.",
            "k_scale_lost",
            reading(new_row),
            K_OR_V,
        ),
        fault(
            "k_scale_1.05_on_new_rows",
            "NVIDIA/TensorRT-LLM#16916",
            "The new key of every layer, 5 % too large.",
            "k_scale_lost",
            reading(slightly),
            K_OR_V,
        ),
        fault(
            "k_scale_lost_on_all_rows",
            "flashinfer-ai/flashinfer#1023",
            f"All keys of every layer, read without their scale of {_SCALE}.",
            "k_scale_lost",
            reading(times(_SCALE)),
            K_OR_V,
        ),
        fault(
            "v_scale_twice",
            "vllm-project/vllm#42580",
            f"All values of every layer, read with their scale of {_SCALE} taken twice.",
            "v_scale",
            reading(None, times(_SCALE)),
        ),
        fault(
            "v_scale_0.9",
            "vllm-project/vllm#27232",
            "All values of every layer, 10 % too small.",
            "v_scale",
            reading(None, times(0.9)),
        ),
        fault(
            "v_scale_1.001",
            "vllm-project/vllm#27232",
            "All values of every layer, 0.1 % too large.",
            "v_scale",
            reading(None, times(1.001)),
        ),
    )


def _rounded() -> tuple[LlamaFault, ...]:
    def through(dtype: type) -> Callable[[Floats], Floats]:
        return lambda rows: rows.astype(dtype).astype(np.float32)

    def newest(rows: Floats) -> Floats:
        return with_cells(rows, -1, through(ml_dtypes.float8_e4m3fn)(rows[-1]))

    def levels(rows: Floats) -> Floats:
        """To 15 levels, one scale a channel and head."""
        scale = np.abs(rows).max(axis=0, keepdims=True) / 7
        return np.asarray(np.where(scale > 0, np.rint(rows / np.where(scale > 0, scale, 1.0)) * scale, rows))

    def without_tail(rows: Floats) -> Floats:
        rows = rows.copy()
        rows[..., -(rows.shape[-1] // 4) :] = 0.0
        return rows

    def reinterpreted(rows: Floats) -> Floats:
        return rows.astype(ml_dtypes.bfloat16).view(np.float16).astype(np.float32)

    def fault(
        name: str,
        reference: str,
        where: str,
        cause: str,
        new: Callable[[Floats], Floats],
        *,
        keys_only: bool = False,
        applies: Applies = attends,
    ) -> LlamaFault:
        change = reading(each(new), None if keys_only else each(new))
        return cache_fault(name, "M20", reference, where, cause, change, applies=applies)

    return (
        fault(
            "kv_fp8",
            "FlashML-org/FreeToken#103",
            "All rows of every layer, rounded to fp8 (e4m3).",
            "kv_rounded_fp8",
            through(ml_dtypes.float8_e4m3fn),
        ),
        fault(
            "kv_fp8_on_new_rows",
            "vllm-project/vllm#54338",
            "New rows of every layer, rounded to fp8 (e4m3) as they are stored.",
            "kv_rounded_fp8",
            newest,
        ),
        fault(
            "kv_int4",
            "ggml-org/llama.cpp#23717",
            "All rows of every layer, rounded to 15 levels a channel.",
            "kv_rounded_int4",
            levels,
        ),
        fault(
            "kv_bf16",
            "ggml-org/llama.cpp#23717",
            "All rows of every layer, rounded to bf16.",
            "kv_rounded_bf16",
            through(ml_dtypes.bfloat16),
            applies=lambda grounds: None if packed(grounds) else "packed blocks hold fewer bits than bf16",
        ),
        fault(
            "kv_bits_reinterpreted",
            "vllm-project/vllm#54338",
            "All rows of every layer, stored as bf16 and read as fp16.",
            "kv_bits_reinterpreted",
            reinterpreted,
        ),
        fault(
            "k_tail_dims_zero",
            "flashinfer-ai/flashinfer#5085",
            "The last quarter of each key of every layer, not loaded and zero.",
            "k_tail_dims_lost",
            without_tail,
            keys_only=True,
        ),
    )


def _softmax() -> tuple[LlamaFault, ...]:
    def fault(name: str, where: str, dtype: type) -> LlamaFault:
        def change(spot: Spot) -> Iterator[None]:
            """Scores, sums and quotients rounded."""
            if spot.kind == "softmax":
                mask, scale = spot.source(1).values()[0, 0, :1].astype(np.float64), spot.node.parameter(0)
                raw = spot.source(0).values()[0, :, 0].astype(np.float64)
                scores = (raw * scale + mask).astype(dtype).astype(np.float64)
                yield
                weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
                spot.write((weights / weights.sum(axis=-1, keepdims=True)).astype(dtype))

        return attention_fault(
            name,
            "M25",
            "huggingface/transformers#17437",
            where,
            "softmax_dtype",
            change,
            sites=SCORES,
            applies=lambda grounds: "attention sinks" if grounds.sinks else apart(grounds),
        )

    return (
        fault("softmax_in_bf16", "The softmax of every layer, computed in bf16.", ml_dtypes.bfloat16),
        fault("softmax_in_fp16", "The softmax of every layer, computed in fp16.", np.float16),
    )
