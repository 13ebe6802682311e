"""Positions, their rotation, and the cache."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from kvdrift_bench.planted.torch.ways import CacheCall, Rotation, in_positions, in_reads, in_rotation, in_writes
from tests.support.untuned.register import fault


@fault("rope_angles", "rope_position_offset", "rope_scaling")
@in_rotation
def rotated_the_other_way(call: Rotation) -> tuple[Tensor, Tensor]:
    return call.rotate(call.q, call.k, call.cos, -call.sin)


@fault("rope_position_offset")
@in_positions
def position_within_the_page(right: Tensor, commits: Any) -> Tensor:
    return right % 8


@fault("slot_half_stale", "slot_zero", "heads_zero", "head_group_wrong")
@in_writes
def second_kv_head_not_written(call: CacheCall) -> tuple[Tensor, Tensor]:
    keys, values = call.keys.clone(), call.values.clone()
    keys[:, 1], values[:, 1] = 0.0, 0.0
    return keys, values


@fault("slot_aliased", "slots_swapped", "slots_shifted", "v_permuted")
@in_reads
def pages_exchanged(call: CacheCall) -> tuple[Tensor, Tensor]:
    order = list(range(call.keys.shape[2]))
    order[:8] = [4, 5, 6, 7, 0, 1, 2, 3]
    return call.keys, call.values[:, :, order]


@fault("heads_scaled", "v_scale")
@in_reads
def scale_of_another_kv_head(call: CacheCall) -> tuple[Tensor, Tensor]:
    values = call.values.clone()
    values[:, 1] *= 1.25
    return call.keys, values


@fault("block_scaled", "quantised_scale_wrong", "k_scale_lost")
@in_reads
def scale_of_one_group_of_dims_lost(call: CacheCall) -> tuple[Tensor, Tensor]:
    keys = call.keys.clone()
    keys[..., 8:12] *= 4.0
    return keys, call.values


@fault("quantised_zero_point_lost", "constant_offset")
@in_reads
def zero_point_lost(call: CacheCall) -> tuple[Tensor, Tensor]:
    return call.keys, call.values - call.values.amin(-1, keepdim=True)


@fault("slot_aliased", "slots_shifted")
@in_reads
def new_key_in_two_slots(call: CacheCall) -> tuple[Tensor, Tensor]:
    keys = call.keys.clone()
    keys[:, :, -2] = keys[:, :, -1]
    return keys, call.values


@fault("kv_rounded_fp8", "kv_rounded_int8", "kv_rounded_int4", "kv_truncated")
@in_reads
def keys_in_int8_by_tensor(call: CacheCall) -> tuple[Tensor, Tensor]:
    step = call.keys.abs().amax() / 127
    return (call.keys / step).round() * step, call.values
