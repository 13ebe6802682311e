"""Faults of lengths and of shared layers that need a scenario: window edges, last positions, keys of another layer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import with_rows
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.parts import needs_positions, needs_rotation, needs_window
from kvdrift_bench.planted.torch.scenario_alone import needs_sharing, sharing_layers
from kvdrift_bench.planted.torch.scenario_fault import ROTATED, scenario_fault
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


def length_faults() -> tuple[Fault, ...]:
    """Return the faults of lengths and of shared layers that need a scenario."""
    return (*_lengths(), *_shared())


def _lengths() -> tuple[Fault, ...]:
    def first_step_behind(beyond: int) -> Way:
        """The first step behind a prefill that is longer than the window by `beyond`."""

        def read(call: CacheCall) -> tuple[Tensor, Tensor] | None:
            window, log = getattr(call.layers[call.layer], "sliding_window", None), call.commits.log
            if window is None or call.commits.q_len > 1 or log.call_before != (0, window + beyond):
                return None
            # The oldest key that the newest token still sees.
            oldest = max(0, call.keys.shape[2] - window)
            row = slice(oldest, oldest + 1)
            return with_rows(call.keys, row, torch.zeros_like(call.keys[:, :, row])), call.values

        return in_reads(read)

    def byte(right: Tensor, commits: Commits) -> Tensor | None:
        return right.clamp(max=255) if int(right.max()) > 255 else None

    def wraps(model_end: int) -> Callable[[Rotation], tuple[Tensor, Tensor] | None]:
        def change(call: Rotation) -> tuple[Tensor, Tensor] | None:
            last = int(call.positions.max())
            if last < model_end:
                return None
            return call.rotate(call.q, call.k, *call.tables(torch.zeros_like(call.positions)))

        return change

    def table_end(model: Any, commits: Commits) -> AbstractContextManager[None]:
        return in_rotation(wraps(int(model.config.max_position_embeddings) - 1))(model, commits)

    def clamped(model: Any, commits: Commits) -> AbstractContextManager[None]:
        end = int(model.config.max_position_embeddings) - 3
        return in_positions(lambda right, _: right.clamp(max=end) if int(right.max()) > end else None)(model, commits)

    return (
        scenario_fault(
            "window_edge_row_lost",
            "M09",
            "huggingface/transformers#37574",
            "Behind a prefill of exactly one window, the oldest key that is still seen is zero.",
            "window_edge",
            "key_lost_first",
            first_step_behind(0),
            (Site.K_CACHE,),
            needs_window,
        ),
        scenario_fault(
            "window_overfilled_by_prefill_loses_a_row",
            "M09",
            "ml-explore/mlx-lm#1673",
            "Behind a prefill of one token more than the window, the oldest key that is still seen is zero.",
            "window_edge",
            "key_lost_first",
            first_step_behind(1),
            (Site.K_CACHE,),
            needs_window,
        ),
        scenario_fault(
            "positions_in_one_byte",
            "M04",
            "nkalyanv99/UNI-D2#6",
            "Positions end at 255.",
            "long_context",
            "rope_position_offset",
            in_positions(byte),
            ROTATED,
            needs_positions,
        ),
        scenario_fault(
            "last_position_wraps",
            "M04",
            "huggingface/transformers#29496",
            "The last position of the table is encoded as the first.",
            "last_positions",
            "rope_position_offset",
            table_end,
            (Site.Q_ROPE, Site.K_ROPE),
            needs_rotation,
        ),
        scenario_fault(
            "last_positions_clamped",
            "M04",
            "huggingface/transformers#29496",
            "The last positions of the table share one.",
            "last_positions",
            "rope_position_offset",
            clamped,
            ROTATED,
            needs_positions,
        ),
    )


def _shared() -> tuple[Fault, ...]:
    def several(call: AttentionCall) -> bool:
        """Several tokens behind a single one that was kept: the layer holds on to what it saw at that step."""
        shares, log = bool(getattr(call.module, "is_kv_shared_layer", False)), call.commits.log
        return shares and call.query.shape[2] > 1 and log.call_before[1] == 1 and not log.went_back

    def newest_key_missing(call: AttentionCall) -> bool:
        if several(call):
            call.key = with_rows(call.key, slice(-1, None), torch.zeros_like(call.key[:, :, -1:]))
            return True
        return False

    def values_one_behind(call: AttentionCall) -> bool:
        if several(call):
            call.value = call.value.roll(1, 2)
            return True
        return False

    return (
        scenario_fault(
            "shared_layer_misses_the_newest_key",
            "M15",
            "ml-explore/mlx-lm#1396",
            "Layers that share keys read them before the last of several tokens behind a single step is there.",
            "shared_kv",
            "slot_zeroed",
            in_attention(newest_key_missing),
            (Site.K_CACHE, Site.ATTN_SCORES, Site.ATTN_PROBS),
            needs_sharing,
            lambda model: sharing_layers(model)[0],
        ),
        scenario_fault(
            "shared_layer_values_one_behind",
            "M15",
            "vllm-project/vllm-ascend#11791",
            "Layers that share values read each one slot too late, with several tokens behind a single step.",
            "shared_kv",
            "slot_shifted",
            in_attention(values_one_behind),
            (Site.V_CACHE, Site.ATTN_CTX),
            needs_sharing,
            lambda model: sharing_layers(model)[0],
        ),
    )
