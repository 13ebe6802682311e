"""Faults of lengths and of shared layers that need a scenario: window edges, last positions, keys of another layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.cache import Rows, with_rows
from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import needs_positions, needs_rotation, needs_window
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.scenario_alone import first_sharing, needs_sharing
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

# ------------------------------------------------------------------------------------------------------ lengths


@faults({"window_edge_row_lost": 0, "window_overfilled_by_prefill_loses_a_row": 1}, needs_window)
def first_step_behind_a_window(beyond: int) -> Way:
    """The first step behind a prefill that is longer than the window by `beyond`."""

    @in_reads
    def oldest_lost(call: CacheCall) -> Rows | None:
        window, log = getattr(call.layers[call.layer], "sliding_window", None), call.commits.log
        if window is None or call.commits.q_len > 1 or log.call_before != (0, window + beyond):
            return None
        # The oldest key that the newest token still sees.
        oldest = max(0, call.keys.shape[2] - window)
        row = slice(oldest, oldest + 1)
        return with_rows(call.keys, row, torch.zeros_like(call.keys[:, :, row])), call.values

    return oldest_lost


def _clamped(right: Tensor, end: int) -> Tensor | None:
    """The positions that end at `end`, None where they end before it."""
    return right.clamp(max=end) if int(right.max()) > end else None


@fault(needs_positions)
@in_positions
def positions_in_one_byte(right: Tensor, commits: Commits) -> Tensor | None:
    return _clamped(right, 255)


@fault(needs_rotation)
@contextmanager
def last_position_wraps(model: Any, commits: Commits) -> Iterator[None]:
    last = int(model.config.max_position_embeddings) - 1

    @in_rotation
    def wrap(call: Rotation) -> Rows | None:
        if int(call.positions.max()) < last:
            return None
        return call.rotate(call.q, call.k, *call.tables(torch.zeros_like(call.positions)))

    with wrap(model, commits):
        yield


@fault(needs_positions)
@contextmanager
def last_positions_clamped(model: Any, commits: Commits) -> Iterator[None]:
    end = int(model.config.max_position_embeddings) - 3
    with in_positions(lambda right, _: _clamped(right, end))(model, commits):
        yield


# ------------------------------------------------------------------------------------------------------ shared layers


def _several_behind_a_step(call: AttentionCall) -> bool:
    """Several tokens behind a single one that was kept: the layer holds on to what it saw at that step."""
    shares, log = bool(getattr(call.module, "is_kv_shared_layer", False)), call.commits.log
    return shares and call.query.shape[2] > 1 and log.call_before[1] == 1 and not log.went_back


@fault(needs_sharing, first=first_sharing)
@in_attention
def shared_layer_misses_the_newest_key(call: AttentionCall) -> bool:
    if not _several_behind_a_step(call):
        return False
    call.key = with_rows(call.key, slice(-1, None), torch.zeros_like(call.key[:, :, -1:]))
    return True


@fault(needs_sharing, first=first_sharing)
@in_attention
def shared_layer_values_one_behind(call: AttentionCall) -> bool:
    if not _several_behind_a_step(call):
        return False
    call.value = call.value.roll(1, 2)
    return True
