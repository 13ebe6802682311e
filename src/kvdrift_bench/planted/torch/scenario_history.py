"""Faults that strike only after a certain history of a sequence: the third chunk, a bonus token, drafts fed again.

Each needs what only one scenario does, so that it shows that the scenario earns its place.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.cache import Rows, with_rows
from kvdrift_bench.planted.torch.parts import needs_cache, needs_interface, needs_rotation, needs_states
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import (
    AttentionCall,
    CacheCall,
    Rotation,
    in_attention,
    in_reads,
    in_rotation,
)
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states_after, in_states_before

_TILE = 4  # queries that a kernel takes at once
_SWITCH = 24  # tokens behind which the carrier of the scenario `rope_switch` changes its tables


def _look_ahead(call: AttentionCall, seeing: slice) -> bool:
    """Let the queries `seeing` see all keys, and the others what they may."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    mask = torch.full((rows, keys), -torch.inf, dtype=call.query.dtype, device=call.query.device)
    mask = mask.triu(keys - rows + 1)
    mask[seeing] = 0.0
    call.mask = mask[None, None]
    return True


# ------------------------------------------------------------------------------------------------------ chunks


@fault(needs_cache)
@in_reads
def later_chunks_take_the_first_slots(call: CacheCall) -> Rows | None:
    if not call.commits.log.is_later_chunk or call.keys.shape[2] < 4:
        return None
    return with_rows(call.keys, slice(0, 2), call.keys[:, :, -2:]), call.values


@fault(needs_interface)
@in_attention
def odd_tail_of_a_chunk_sees_ahead(call: AttentionCall) -> bool:
    rows = call.query.shape[2]
    tail = rows % _TILE
    return rows > _TILE and tail > 1 and _look_ahead(call, slice(rows - tail, None))


# ------------------------------------------------------------------------------------------------------ drafts


@fault(needs_cache)
@in_reads
def bonus_token_reads_a_draft_twice(call: CacheCall) -> Rows | None:
    log = call.commits.log
    before, fed = log.call_before
    if call.commits.q_len > 1 or before == 0 or fed < _TILE or log.went_back or call.keys.shape[2] < 3:
        return None
    newest = call.keys.shape[2] - 1
    return with_rows(call.keys, slice(newest - 1, newest), call.keys[:, :, newest - 2 : newest - 1]), call.values


@fault(needs_interface)
@in_attention
def full_draft_sees_ahead(call: AttentionCall) -> bool:
    rows = call.query.shape[2]
    return rows == 2 * _TILE and _look_ahead(call, slice(rows - 2, None))


@fault(needs_cache)
@in_reads
def drafts_fed_again_are_not_written(call: CacheCall) -> Rows | None:
    """The slot of the first token fed after a rewind is taken for one that is written."""
    log, q_len = call.commits.log, call.commits.q_len
    if q_len == 1 or len(log.calls) < 2 or not log.went_back:
        return None
    first = call.values.shape[2] - q_len
    row = slice(first, first + 1)
    return call.keys, with_rows(call.values, row, torch.zeros_like(call.values[:, :, row]))


# ------------------------------------------------------------------------------------------------------ batches
# A smaller batch behind a larger one: what was laid out for the larger one is still in use.


def _shrunk(call: CacheCall) -> bool:
    previous = call.commits.log.previous
    return previous is not None and 1 < call.commits.log.n_rows < previous.n_rows


@fault(needs_cache)
@in_reads
def rows_of_a_larger_batch_stay(call: CacheCall) -> Rows | None:
    kept: dict[tuple[int, torch.dtype], Tensor] = call.commits.memory
    key = call.layer, call.keys.dtype
    if not _shrunk(call):
        kept[key] = call.keys.clone()
        return None
    stale = kept.get(key)
    n_rows = call.keys.shape[0]
    if stale is None or stale.shape[0] <= n_rows or min(stale.shape[2], call.keys.shape[2]) < 2:
        return None
    return with_rows(call.keys, slice(0, 2), stale[:n_rows, :, :2]), call.values


@fault(needs_cache)
@in_reads
def row_numbers_of_a_larger_batch_stay(call: CacheCall) -> Rows | None:
    return (call.keys, call.values.roll(1, 0)) if _shrunk(call) else None


# ------------------------------------------------------------------------------------------------------ twin rows
# Rows that hold the same tokens share their blocks, and what one of them writes is lost for the other.


def _second_twin(call: CacheCall) -> int | None:
    rows = call.keys
    for second in range(1, rows.shape[0]):
        # Keys of other tokens differ by far more than rounding.
        if any(torch.allclose(rows[first], rows[second], rtol=1e-2, atol=1e-3) for first in range(second)):
            return second
    return None


def _with_slots(rows: Tensor, second: int, slots: slice, value: Tensor) -> Tensor:
    rows = rows.clone()
    rows[second, :, slots] = value
    return rows


@fault(needs_cache)
@in_reads
def twin_rows_share_a_block_unwritten(call: CacheCall) -> Rows | None:
    second = _second_twin(call)
    if second is None:
        return None
    last = slice(call.values.shape[2] - 1, None)
    return call.keys, _with_slots(call.values, second, last, torch.zeros_like(call.values[second, :, last]))


@fault(needs_cache)
@in_reads
def twin_rows_write_one_block_twice(call: CacheCall) -> Rows | None:
    second = _second_twin(call)
    if second is None or call.keys.shape[2] < 3:
        return None
    before = slice(call.keys.shape[2] - 2, call.keys.shape[2] - 1)
    return _with_slots(call.keys, second, before, call.keys[second, :, -1:]), call.values


# ------------------------------------------------------------------------------------------------------ states


@fault(needs_states)
@in_states_before
def state_turned_between_step_and_chunk(call: StateCall) -> bool:
    """Two tokens are two steps; three or more are a chunk."""
    behind_a_step = call.commits.q_len > 2 and call.commits.log.call_before[1] == 1
    if not behind_a_step or call.ssm.shape[-1] != call.ssm.shape[-2]:
        return False
    call.ssm.copy_(call.ssm.transpose(-1, -2).clone())
    return True


@fault(needs_states)
@in_states_after
def chunk_that_fills_the_window_loses_its_last(call: StateCall) -> bool:
    if call.commits.q_len != call.module.conv_kernel_size - 1:
        return False
    call.conv[..., -1] = 0.0
    return True


# ------------------------------------------------------------------------------------------------------ switches
# Where another table begins: the token at that length, and the rows that were cached below it.


@fault(needs_rotation)
@in_rotation
def first_token_behind_the_switch_uses_both_tables(call: Rotation) -> Rows | None:
    if call.commits.past != _SWITCH:
        return None
    return call.rotate(call.q, call.k, *call.tables(call.positions * 2))


@fault(needs_cache)
@in_reads
def keys_recomputed_at_the_switch_are_shifted(call: CacheCall) -> Rows | None:
    if not _SWITCH <= call.commits.past <= _SWITCH + 2 or call.keys.shape[2] < _SWITCH:
        return None
    return with_rows(call.keys, slice(0, _SWITCH), call.keys[:, :, :_SWITCH].roll(1, 2)), call.values
