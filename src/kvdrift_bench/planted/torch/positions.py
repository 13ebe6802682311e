"""Faults of position: where a decode step believes to be, and how it rotates queries and keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import (
    first_sliding,
    frequencies,
    is_half,
    needs_positions,
    needs_rotation,
    needs_window,
    rotaries,
    window_of,
)
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import Rotation, Way, in_one_layer, in_positions, in_rotation
from kvdrift_bench.planted.torch.ways_modules import in_attribute, in_outputs

# Beyond this many tokens a model with two sets of RoPE factors takes the long ones.
_SWITCH = 12
# What one more token turns: the offset of a position fault.
_STALE_DELTA = 17

Rotated = tuple[Tensor, Tensor]

_in_frequencies = in_attribute(rotaries, frequencies)


# -------------------------------------------------------------------------------- positions that the model is given


@fault(needs_positions)
@in_positions
def position_plus_one(right: Tensor, commits: Commits) -> Tensor:
    return right + 1


@fault(needs_positions)
@in_positions
def position_minus_one(right: Tensor, commits: Commits) -> Tensor:
    return right - 1


@fault(needs_positions)
@in_positions
def position_zero(right: Tensor, commits: Commits) -> Tensor:
    return right - commits.past


@fault(needs_positions)
@in_positions
def position_of_another_delta(right: Tensor, commits: Commits) -> Tensor:
    return right + _STALE_DELTA


@fault(needs_positions)
@in_positions
def position_of_another_row(right: Tensor, commits: Commits) -> Tensor:
    return right + 2 * commits.past


@fault(needs_positions)
@in_positions
def graph_position_frozen(right: Tensor, commits: Commits) -> Tensor | None:
    captured: Tensor = commits.memory.setdefault("positions", right)
    return None if torch.equal(captured, right) else captured.expand_as(right)


@fault(needs_window)
@contextmanager
def position_capped_at_window(model: nn.Module, commits: Commits) -> Iterator[None]:
    window = window_of(model, first_sliding(model)) or 0
    with in_positions(lambda right, commits: right.clamp_max(window))(model, commits):
        yield


# -------------------------------------------------------------------------------------- positions of one rotation


def _turned(call: Rotation, *, q: int = 0, k: int = 0) -> Rotated:
    """Return the query rotated `q` positions too far, and the key `k` positions."""
    further = {n: call.rotate(call.q, call.k, *call.tables(call.positions + n)) for n in {q, k}}
    return (further[q][0] if q else call.rotated[0]), (further[k][1] if k else call.rotated[1])


@fault(needs_rotation)
@in_rotation
@in_one_layer
def q_position_plus_one(call: Rotation) -> Rotated:
    return _turned(call, q=1)


@fault(needs_rotation)
@in_rotation
@in_one_layer
def k_position_plus_one(call: Rotation) -> Rotated:
    return _turned(call, k=1)


@fault(needs_rotation)
@in_rotation
@in_one_layer
def one_layer_position_plus_one(call: Rotation) -> Rotated:
    return _turned(call, q=1, k=1)


@fault(needs_rotation)
@in_rotation
@in_one_layer
def q_position_advanced_by_donor(call: Rotation) -> Rotated:
    return _turned(call, q=11)


# ------------------------------------------------------------------------------------------- schedules of frequencies


@faults({"rope_base_x10": 10.0, "rope_base_x1.01": 1.01}, needs_rotation)
def rope_base(factor: float) -> Way:
    @_in_frequencies
    def rebased(table: Tensor) -> Tensor:
        exponents = torch.arange(len(table), device=table.device, dtype=table.dtype) / len(table)
        return table * factor**-exponents

    return rebased


@fault(needs_rotation)
@_in_frequencies
def rope_linear_scaling_of_4(table: Tensor) -> Tensor:
    return table / 4.0


@fault(needs_rotation, name="rope_attention_factor_1.02")
@in_outputs(rotaries)
def rope_attention_factor(module: Any, args: tuple[Any, ...], output: Rotated) -> tuple[Tensor, ...]:
    return tuple(part * 1.02 for part in output)


@fault(needs_rotation)
@in_rotation
def rope_long_factor_switch(call: Rotation) -> Rotated | None:
    """Beyond the switch, rotate as a model does whose frequencies are half as high."""
    if call.commits.past + call.commits.q_len <= _SWITCH:
        return None
    return call.rotate(call.q, call.k, *call.tables(call.positions / 2))


# ----------------------------------------------------------------------------------------------- precision of tables


def _through_bf16(tensor: Tensor) -> Tensor:
    return tensor.to(torch.bfloat16).to(tensor.dtype)


@fault(needs_rotation)
@_in_frequencies
def rope_frequencies_bf16(table: Tensor) -> Tensor:
    return _through_bf16(table)


@fault(needs_rotation)
@in_rotation
def rope_frequencies_native(call: Rotation) -> Rotated | None:
    if not is_half(call.q):
        return None
    table = getattr(call.module, frequencies(call.module)[0]).to(call.q.dtype)
    angle = call.positions.to(call.q.dtype)[..., None] * table
    if call.cos.shape[-1] == 2 * len(table):
        angle = torch.cat([angle, angle], dim=-1)
    factor = getattr(call.module, "attention_scaling", 1.0)  # which scaled tables carry besides their angles
    return call.rotate(call.q, call.k, angle.cos() * factor, angle.sin() * factor)


@fault(needs_rotation)
@in_outputs(rotaries)
def rope_tables_bf16(module: Any, args: tuple[Any, ...], output: Rotated) -> tuple[Tensor, ...]:
    return tuple(_through_bf16(part) for part in output)


@fault(needs_rotation)
@_in_frequencies
def rope_slowest_pair_lost(table: Tensor) -> Tensor:
    lost = table.clone()
    lost[-1] = 0.0
    return lost


# ---------------------------------------------------------------------------------------------------------- rotations


@fault(needs_rotation)
@in_rotation
def k_stored_unrotated(call: Rotation) -> Rotated:
    return call.rotated[0], call.k


@fault(needs_rotation)
@in_rotation
def k_rotated_twice(call: Rotation) -> Rotated:
    return call.rotated[0], call.rotate(*call.rotated, call.cos, call.sin)[1]


@fault(needs_rotation)
@in_rotation
def rope_on_half_of_the_dims(call: Rotation) -> Rotated:
    """Leave the later frequencies unrotated; tables hold each frequency once or, in two halves, twice."""
    dims = call.cos.shape[-1]
    halves = 2 if dims == call.q.shape[-1] or dims > call.q.shape[-1] // 2 else 1
    cos, sin = call.cos.clone(), call.sin.clone()
    for half in range(halves):
        later = slice((2 * half + 1) * dims // (2 * halves), (half + 1) * dims // halves)
        cos[..., later], sin[..., later] = 1.0, 0.0
    return call.rotate(call.q, call.k, cos, sin)


@fault(needs_rotation)
@in_rotation
def rope_interleaved(call: Rotation) -> Rotated:
    dims = call.q.shape[-1]
    order = [dim for pair in zip(range(dims // 2), range(dims // 2, dims), strict=True) for dim in pair]
    # Dims 2i and 2i + 1 are put where the model's rotation looks for a pair, and back afterwards.
    there = [*range(0, dims, 2), *range(1, dims, 2)]
    q, k = call.rotate(call.q[..., there], call.k[..., there], call.cos, call.sin)
    return q[..., order], k[..., order]
