"""Faults that prefill and decode of one fresh sequence cannot show: the catalogue names the scenario that each needs.

A runner skips them, with that reason, until it has the scenario; how they are planted is settled here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.cache import Rows, stale, with_rows
from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import (
    frequencies,
    needs_cache,
    needs_interface,
    needs_positions,
    needs_rotation,
    needs_states,
)
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import (
    AttentionCall,
    CacheCall,
    Rotation,
    Way,
    in_attention,
    in_positions,
    in_reads,
    in_rotation,
)
from kvdrift_bench.planted.torch.ways_methods import in_method
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states_after

_FIRST_FOUR = slice(0, 4)

# ------------------------------------------------------------------------------------------------------ batches


@fault(needs_interface)
@in_attention
def pads_visible(call: AttentionCall) -> bool:
    if call.query.shape[0] == 1 or call.mask is None:
        return False
    hidden = call.mask.dtype == torch.bool
    call.mask = torch.ones_like(call.mask) if hidden else torch.zeros_like(call.mask)
    return True


@fault(needs_interface)
@in_attention
def padding_mask_shifted(call: AttentionCall) -> bool:
    if call.query.shape[0] == 1 or call.mask is None:
        return False
    call.mask = call.mask.roll(-1, dims=-1)
    return True


@fault(needs_positions)
@in_positions
def positions_ignore_padding(right: Tensor, commits: Commits) -> Tensor:
    """Positions counted from the padded start are the same for all rows, as `right` is."""
    return right


@fault(needs_cache)
@in_reads
def rows_written_to_first(call: CacheCall) -> Rows | None:
    if call.keys.shape[0] == 1:
        return None
    return call.keys[:1].expand_as(call.keys).clone(), call.values[:1].expand_as(call.values).clone()


@fault(needs_cache)
@in_reads
def rows_rolled(call: CacheCall) -> Rows | None:
    return (call.keys.roll(1, 0), call.values.roll(1, 0)) if call.keys.shape[0] > 1 else None


@fault(needs_rotation)
@in_rotation
def rope_of_first_row_only(call: Rotation) -> tuple[Tensor, Tensor] | None:
    if call.q.shape[0] == 1:
        return None
    q, k = call.rotated[0].clone(), call.rotated[1].clone()
    q[1:], k[1:] = 0.0, 0.0
    return q, k


@fault(needs_cache)
@in_method("reorder_cache")
def beam_reorder_skipped(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
    commits.take(rows, None)


# ------------------------------------------------------------------------------------------------------ rewinds


@faults({"rewind_forgets_one": 1, "rewind_takes_two_more": -2}, needs_cache)
def rewind(extra: int) -> Way:
    @in_method("crop")
    def crop(original: Any, commits: Commits, cache: Any, n: int) -> None:
        original(cache, commits.take(n, min(0, n + extra)))

    return crop


@fault(needs_interface)
@in_attention
def history_lost_at_verify(call: AttentionCall) -> bool:
    rows = call.query.shape[2]
    if rows == 1:
        return False
    call.key, call.value = call.key[:, :, -rows:], call.value[:, :, -rows:]
    call.mask = None if call.mask is None else call.mask[..., -rows:]
    return True


# ------------------------------------------------------------------------------------------------------ later calls


@fault(needs_cache)
@in_reads
def prefix_of_previous_call(call: CacheCall) -> Rows | None:
    """The first four rows that one cache has held, served again when a text as long is in it."""
    previous = call.commits.log.previous
    if call.keys.shape[0] != 1 or call.keys.shape[2] < 4:
        return None
    first = call.keys[:, :, _FIRST_FOUR]
    # Held on to, so that no later cache gets the identity of this one.
    kept = call.commits.memory.setdefault((id(call.layers), call.layer), (call.layers, first.clone()))
    if previous is None or previous.length != call.commits.log.length or kept[1].dtype != call.keys.dtype:
        return None
    return None if torch.equal(kept[1], first) else (with_rows(call.keys, _FIRST_FOUR, kept[1]), call.values)


def _after_longer(commits: Commits) -> int:
    """How much longer the sequence was that this cache held before, if twice as long or more; 0 otherwise."""
    before, length = commits.log.before_reset, commits.log.length
    return before.length - length if before is not None and before.length >= 2 * length else 0


@fault(needs_positions)
@in_positions
def delta_of_previous_call(right: Tensor, commits: Commits) -> Tensor | None:
    behind = _after_longer(commits)
    return right + behind if behind else None


@fault(needs_rotation)
@in_rotation
def rope_base_of_previous_call(call: Rotation) -> tuple[Tensor, Tensor] | None:
    if not _after_longer(call.commits):
        return None
    before = {name: getattr(call.module, name) for name in frequencies(call.module)}
    try:
        for name, table in before.items():
            exponents = torch.arange(len(table), device=table.device, dtype=table.dtype) / len(table)
            setattr(call.module, name, table * 2.0**-exponents)
        return call.rotate(call.q, call.k, *call.tables(call.positions))
    finally:
        for name, table in before.items():
            setattr(call.module, name, table)


# ------------------------------------------------------------------------------------------------------ chunks


@fault(needs_interface)
@in_attention
def future_visible_in_chunk(call: AttentionCall) -> bool:
    if call.query.shape[2] == 1:
        return False
    shape = 1, 1, call.query.shape[2], call.key.shape[2]
    call.mask = torch.zeros(shape, dtype=call.query.dtype, device=call.query.device)
    return True


@fault(needs_cache)
@in_reads
def chunk_offset_missing(call: CacheCall) -> Rows | None:
    rows = call.commits.q_len
    if rows == 1 or call.keys.shape[2] < 2 * rows:
        return None
    return with_rows(call.keys, slice(0, rows), call.keys[:, :, -rows:]), call.values


@fault(needs_states)
@in_states_after
def state_of_first_token_only(call: StateCall) -> bool:
    if call.commits.q_len == 1:
        return False
    call.ssm.copy_(stale(call.ssm, call.layer))
    return True


@fault(needs_states)
@in_states_after
def conv_state_loses_oldest(call: StateCall) -> bool:
    if call.commits.q_len == 1:
        return False
    call.conv[..., 0] = 0.0
    return True


# ------------------------------------------------------------------------------------------------------ long contexts


@fault(needs_rotation)
@in_rotation
def positions_bf16(call: Rotation) -> tuple[Tensor, Tensor] | None:
    positions = call.positions.to(torch.bfloat16).to(torch.float32)
    if torch.equal(positions, call.positions.to(torch.float32)):
        return None
    return call.rotate(call.q, call.k, *call.tables(positions))
