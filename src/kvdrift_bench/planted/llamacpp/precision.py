"""Faults of precision: stored keys and values with a wrong scale or in fewer bits, softmax in less."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np

from kvdrift_bench.planted.llamacpp.attention import apart, attends
from kvdrift_bench.planted.llamacpp.cache import in_keys, in_rows, in_values, packed, with_cells
from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.registry import fault, faults
from kvdrift_bench.planted.llamacpp.ways import Change, Floats, Spot

_SCALE = 0.125

# ------------------------------------------------------------------------------------------------------ wrong scales


@faults({"k_scale_lost_on_new_rows": _SCALE, "k_scale_1.05_on_new_rows": 1.05}, attends)
def new_key_scaled(factor: float) -> Change:
    return in_keys(lambda spot, rows: with_cells(rows, -1, rows[-1] * np.float32(factor)))


@fault(attends)
@in_keys
def k_scale_lost_on_all_rows(spot: Spot, rows: Floats) -> Floats:
    return rows * np.float32(_SCALE)


@faults({"v_scale_twice": _SCALE, "v_scale_0.9": 0.9, "v_scale_1.001": 1.001}, attends)
def v_scale(factor: float) -> Change:
    return in_values(lambda spot, rows: rows * np.float32(factor))


# ------------------------------------------------------------------------------------------------------ fewer bits


def _through(rows: Floats, dtype: type) -> Floats:
    """Rows after a visit to a narrower dtype."""
    return rows.astype(dtype).astype(np.float32)


@fault(attends)
@in_rows
def kv_fp8(spot: Spot, rows: Floats) -> Floats:
    return _through(rows, ml_dtypes.float8_e4m3fn)


@fault(attends)
@in_rows
def kv_fp8_on_new_rows(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, -1, _through(rows[-1], ml_dtypes.float8_e4m3fn))


@fault(attends)
@in_rows
def kv_int4(spot: Spot, rows: Floats) -> Floats:
    """To 15 levels, one scale a channel and head."""
    scale = np.abs(rows).max(axis=0, keepdims=True) / 7
    return np.asarray(np.where(scale > 0, np.rint(rows / np.where(scale > 0, scale, 1.0)) * scale, rows))


def _unpacked(grounds: Grounds) -> str | None:
    return None if packed(grounds) else "packed blocks hold fewer bits than bf16"


@fault(_unpacked)
@in_rows
def kv_bf16(spot: Spot, rows: Floats) -> Floats:
    return _through(rows, ml_dtypes.bfloat16)


@fault(attends)
@in_rows
def kv_bits_reinterpreted(spot: Spot, rows: Floats) -> Floats:
    return rows.astype(ml_dtypes.bfloat16).view(np.float16).astype(np.float32)


@fault(attends)
@in_keys
def k_tail_dims_zero(spot: Spot, rows: Floats) -> Floats:
    rows = rows.copy()
    rows[..., -(rows.shape[-1] // 4) :] = 0.0
    return rows


# ------------------------------------------------------------------------------------------------------ softmax


def apart_without_sinks(grounds: Grounds) -> str | None:
    """Whether softmax is an operation of its own, over keys alone."""
    return "attention sinks" if grounds.sinks else apart(grounds)


@faults({"softmax_in_bf16": ml_dtypes.bfloat16, "softmax_in_fp16": np.float16}, apart_without_sinks)
def softmax_in(dtype: type) -> Change:
    """Scores, sums and quotients rounded."""

    def change(spot: Spot) -> Iterator[None]:
        if spot.kind == "softmax":
            mask, scale = spot.source(1).values()[0, 0, :1].astype(np.float64), spot.node.parameter(0)
            raw = spot.source(0).values()[0, :, 0].astype(np.float64)
            scores = (raw * scale + mask).astype(dtype).astype(np.float64)
            yield
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            spot.write((weights / weights.sum(axis=-1, keepdims=True)).astype(dtype))

    return change
