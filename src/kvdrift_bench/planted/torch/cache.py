"""Faults of the cache: slots stale, lost, exchanged."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.parts import first_sliding, is_half, needs_cache, needs_window
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import (
    AttentionCall,
    CacheCall,
    Way,
    beside,
    in_attention,
    in_one_layer,
    in_reads,
    in_writes,
)

_SLOT = 5
_BLOCK = slice(4, 8)
_FIRST_FOUR = slice(0, 4)
_SEED = 20_241
_RACE_SEED = 8

Rows = tuple[Tensor, Tensor]


def reading(change: Callable[[CacheCall], Rows | None]) -> Way:
    """Change what layers read. The rows that the faults touch must be there; a shorter cache is left alone."""

    @wraps(change)
    def long_enough(call: CacheCall) -> Rows | None:
        return change(call) if call.keys.shape[2] > _SLOT else None

    return in_reads(long_enough)


def only_half(change: Callable[[CacheCall], Rows]) -> Callable[[CacheCall], Rows | None]:
    """Make a change only where keys have a 16-bit dtype."""

    @wraps(change)
    def in_half(call: CacheCall) -> Rows | None:
        return change(call) if is_half(call.keys) else None

    return in_half


def stale(rows: Tensor, salt: int) -> Tensor:
    """Return other content of the same kind: rows of the same size in every dim, from a seeded generator."""
    generator = torch.Generator().manual_seed(_SEED + salt)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32).to(rows.device, rows.dtype)
    return noise * rows.square().mean().sqrt()


def with_rows(tensor: Tensor, rows: slice | int | list[int], new: Tensor | float) -> Tensor:
    """Return a copy of [1, head, row, dim] with `new` in some rows."""
    tensor = tensor.clone()
    tensor[:, :, rows] = new
    return tensor


def with_stale(call: CacheCall, rows: slice | int) -> Rows:
    """Return keys and values with some rows of what an earlier request left there."""
    return (
        with_rows(call.keys, rows, stale(call.keys[:, :, rows], call.layer)),
        with_rows(call.values, rows, stale(call.values[:, :, rows], -1 - call.layer)),
    )


def _with_zeros(call: CacheCall, slot: int) -> Rows:
    return with_rows(call.keys, slot, 0.0), with_rows(call.values, slot, 0.0)


# ------------------------------------------------------------------------------------------------------ slots


@fault(needs_cache)
@reading
@in_one_layer
def slot_aliased(call: CacheCall) -> Rows:
    return with_rows(call.keys, _SLOT, call.keys[:, :, _SLOT - 1]), call.values


@fault(needs_cache)
@reading
@in_one_layer
def slot_stale(call: CacheCall) -> Rows:
    return with_stale(call, _SLOT)


@fault(needs_cache)
@reading
@in_one_layer
def slot_zero(call: CacheCall) -> Rows:
    return _with_zeros(call, _SLOT)


@fault(needs_cache)
@reading
@in_one_layer
def value_slots_exchanged(call: CacheCall) -> Rows:
    order = list(range(call.values.shape[2]))
    order[2], order[6] = order[6], order[2]
    return call.keys, call.values[:, :, order]


@fault(needs_cache)
@reading
@in_one_layer
def block_stale(call: CacheCall) -> Rows:
    return with_stale(call, _BLOCK)


@fault(needs_cache)
@reading
@in_one_layer
def tail_rows_stale(call: CacheCall) -> Rows:
    return with_stale(call, slice(-3, None))


@fault(needs_cache)
@in_writes
@in_one_layer
def last_slots_of_another_page(call: CacheCall) -> Rows:
    return torch.zeros_like(call.keys), torch.zeros_like(call.values)


@fault(needs_cache)
@reading
def first_slot_never_written(call: CacheCall) -> Rows:
    return _with_zeros(call, 0)


@fault(needs_cache)
@reading
def last_prompt_slot_overwritten(call: CacheCall) -> Rows:
    return with_stale(call, slice(-2, -1))


@fault(needs_cache)
@in_writes
def draft_token_in_current_slot(call: CacheCall) -> Rows:
    return stale(call.keys, call.layer), stale(call.values, -1 - call.layer)


# ------------------------------------------------------------------------------------------------------ windows


def _remember(call: CacheCall) -> None:
    """Keep the rows of the window by their positions, of one sequence at one dtype."""
    layer = call.layers[call.layer]
    if not (layer.is_initialized and layer.is_sliding):
        return
    known = call.commits.memory.setdefault(call.layer, {})
    for index in range(layer.keys.shape[2]):
        position = call.commits.past - layer.keys.shape[2] + index
        rows = layer.keys[:, :, index : index + 1].clone(), layer.values[:, :, index : index + 1].clone()
        before = known.get(position)
        if before is not None and not (
            before[0].dtype == rows[0].dtype and torch.allclose(before[0], rows[0], rtol=0.1, atol=0.1)
        ):
            known.clear()
        known[position] = rows


@fault(needs_window, first=first_sliding)
@beside(in_writes(_remember))
@in_attention
def window_plus_one(call: AttentionCall) -> bool:
    """One key more than the window holds: the row that left it last, which needs no order among the keys."""
    window = call.module.config.sliding_window
    left = call.commits.memory.get(call.layer, {}).get(call.commits.past - window)
    if left is None or call.key.shape[2] != window or left[0].dtype != call.key.dtype:
        return False
    call.key, call.value = torch.cat([call.key, left[0]], 2), torch.cat([call.value, left[1]], 2)
    if call.mask is not None:
        call.mask = torch.cat([call.mask, call.mask[..., -1:]], -1)
    return True


@fault(needs_window, first=first_sliding)
@reading
def ring_not_advanced(call: CacheCall) -> Rows | None:
    """The newest row lands on the second newest instead of on the oldest one, which stays: one row is lost and one is
    there that has left the window."""
    full = call.keys.shape[2] >= 8 and call.layers[call.layer].is_sliding
    if not full:
        return None
    order = list(range(call.keys.shape[2]))
    order[-2] = order[0]
    return call.keys[:, :, order], call.values[:, :, order]


# ------------------------------------------------------------------------------------------------------ prefixes


@fault(needs_cache)
@reading
def prefix_of_other_weights(call: CacheCall) -> Rows:
    """As if a small adapter had been active when the first four rows were computed."""
    keys, values = call.keys[:, :, _FIRST_FOUR], call.values[:, :, _FIRST_FOUR]
    return (
        with_rows(call.keys, _FIRST_FOUR, keys + 0.02 * stale(keys, call.layer)),
        with_rows(call.values, _FIRST_FOUR, values + 0.02 * stale(values, -1 - call.layer)),
    )


@fault(needs_cache)
@reading
def prefix_of_another_prompt(call: CacheCall) -> Rows:
    return with_stale(call, _FIRST_FOUR)


# ------------------------------------------------------------------------------------------------------ races


@fault(needs_cache)
@reading
@in_one_layer
def racing_block(call: CacheCall) -> Rows | None:
    """A copy that is sometimes overtaken; which step it hits depends on all steps before."""
    generator = call.commits.memory.setdefault("generator", torch.Generator().manual_seed(_RACE_SEED))
    return None if float(torch.rand(1, generator=generator)) < 0.5 else with_stale(call, _BLOCK)


@fault(needs_cache)
@reading
@in_one_layer
def block_stale_once(call: CacheCall) -> Rows | None:
    """A copy that is overtaken in the second decode step, and never again."""
    steps: int = call.commits.memory.get("steps", 0) + 1
    call.commits.memory["steps"] = steps
    return with_stale(call, _BLOCK) if steps == 2 else None


@fault(needs_cache)
@reading
@in_one_layer
def torn_row(call: CacheCall) -> Rows:
    half = call.keys.shape[-1] // 2
    row = call.keys[:, :, _SLOT]
    fresh_and_stale = torch.cat([row[..., :half], stale(row, call.layer)[..., half:]], dim=-1)
    return with_rows(call.keys, _SLOT, fresh_and_stale), call.values


@fault(needs_cache)
@in_writes
def rows_never_copied(call: CacheCall) -> Rows:
    return torch.zeros_like(call.keys), torch.zeros_like(call.values)
