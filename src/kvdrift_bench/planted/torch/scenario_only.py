"""Faults that prefill and decode of one fresh sequence cannot show: each names the scenario that it needs.

A runner skips them, with that reason, until it has the scenario; how they are planted is settled here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import stale, with_rows
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.parts import (
    frequencies,
    needs_interface,
    needs_positions,
    needs_rotation,
    needs_states,
)
from kvdrift_bench.planted.torch.scenario_fault import CACHE, ROTATED, SCORES, scenario_fault
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
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states_after


def scenario_faults() -> tuple[Fault, ...]:
    """Return the faults that need a scenario."""
    return (*_batches(), *_rewinds(), *_later_calls(), *_chunks(), *_long())


def _batches() -> tuple[Fault, ...]:
    def several(change: Callable[[CacheCall], tuple[Tensor, Tensor]]) -> Way:
        return in_reads(lambda call: change(call) if call.keys.shape[0] > 1 else None)

    def pads_visible(call: AttentionCall) -> bool:
        if call.query.shape[0] == 1 or call.mask is None:
            return False
        hidden = call.mask.dtype == torch.bool
        call.mask = torch.ones_like(call.mask) if hidden else torch.zeros_like(call.mask)
        return True

    def one_less_padding(call: AttentionCall) -> bool:
        if call.query.shape[0] == 1 or call.mask is None:
            return False
        call.mask = call.mask.roll(-1, dims=-1)
        return True

    def shared(right: Tensor, commits: Commits) -> Tensor:
        """Positions counted from the padded start, the same for all rows."""
        return right

    def rows_lost(call: Rotation) -> tuple[Tensor, Tensor] | None:
        if call.q.shape[0] == 1:
            return None
        q, k = call.rotated[0].clone(), call.rotated[1].clone()
        q[1:], k[1:] = 0.0, 0.0
        return q, k

    def from_first(rows: Tensor) -> Tensor:
        return rows[:1].expand_as(rows).clone()

    return (
        scenario_fault(
            "pads_visible",
            "M08",
            "huggingface/transformers#29389",
            "The padding mask, left out of decode steps of a batch.",
            "batch_padded",
            "mask_leak",
            in_attention(pads_visible),
            SCORES,
            needs_interface,
        ),
        scenario_fault(
            "padding_mask_shifted",
            "M08",
            "Blaizzy/mlx-vlm#1946",
            "The padding mask of a batch, shifted by one key.",
            "batch_padded",
            "mask_leak",
            in_attention(one_less_padding),
            SCORES,
            needs_interface,
        ),
        scenario_fault(
            "positions_ignore_padding",
            "M02",
            "unslothai/unsloth#3699",
            "The positions of a padded batch, counted from the padded start.",
            "batch_padded",
            "rope_position_offset",
            in_positions(shared),
            ROTATED,
            needs_positions,
        ),
        scenario_fault(
            "rows_written_to_first",
            "M11",
            "Dao-AILab/flash-attention#772",
            "Every row of a batch reads the cache of row 0.",
            "batch",
            "batch_row_wrong",
            several(lambda call: (from_first(call.keys), from_first(call.values))),
            CACHE,
        ),
        scenario_fault(
            "rows_rolled",
            "M23",
            "PaddlePaddle/PaddleNLP#6672",
            "Every row of a batch reads the cache of its neighbour.",
            "batch",
            "batch_row_wrong",
            several(lambda call: (call.keys.roll(1, 0), call.values.roll(1, 0))),
            CACHE,
        ),
        scenario_fault(
            "rope_of_first_row_only",
            "M24",
            "ml-explore/mlx#3494",
            "The rotation kernel writes row 0 of a batch only.",
            "batch",
            "rope_rows_lost",
            in_rotation(rows_lost),
            (Site.Q_ROPE, Site.K_ROPE),
            needs_rotation,
        ),
        scenario_fault(
            "beam_reorder_skipped",
            "M23",
            "huggingface/transformers#46612",
            "The cache is not put into the order of the surviving beams.",
            "beams",
            "batch_row_wrong",
            _without_method("reorder_cache", lambda original, cache, beams: None),
            CACHE,
        ),
    )


def _without_method(name: str, instead: Callable[..., Any]) -> Way:
    """Return the way that replaces a method of the cache by `instead(original, cache, ...)`."""

    def way(model: nn.Module, commits: Commits) -> AbstractContextManager[None]:
        return _replaced(name, instead, commits)

    return way


@contextmanager
def _replaced(name: str, instead: Callable[..., Any], commits: Commits) -> Iterator[None]:
    from transformers.cache_utils import Cache

    original = Cache.__dict__[name]

    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        commits.take(None, name)
        return instead(original, self, *args, **kwargs)

    setattr(Cache, name, method)
    try:
        yield
    finally:
        setattr(Cache, name, original)


def _rewinds() -> tuple[Fault, ...]:
    def rewind(name: str, reference: str, where: str, cause: str, extra: int) -> Fault:
        # Positions are counted from what the cache holds, so a wrong length shows in the rotation first.
        way = _without_method("crop", lambda original, cache, n: original(cache, min(0, n + extra)))
        return scenario_fault(name, "M12", reference, where, "rewind", cause, way, (*ROTATED, *CACHE))

    return (
        rewind(
            "rewind_forgets_one",
            "vllm-project/vllm#40831",
            "Going back leaves the first rejected token in the cache.",
            "rewind_residue",
            1,
        ),
        rewind(
            "rewind_takes_two_more",
            "lablup/mlxcel#994",
            "Going back drops two tokens too many.",
            "rewind_overshoot",
            -2,
        ),
        scenario_fault(
            "history_lost_at_verify",
            "M12",
            "paiml/aprender#2014",
            "A multi-token verification step sees its own tokens only.",
            "verify",
            "history_lost",
            in_attention(_own_tokens_only),
            SCORES,
            needs_interface,
        ),
    )


def _own_tokens_only(call: AttentionCall) -> bool:
    rows = call.query.shape[2]
    if rows == 1:
        return False
    call.key, call.value = call.key[:, :, -rows:], call.value[:, :, -rows:]
    call.mask = None if call.mask is None else call.mask[..., -rows:]
    return True


def _later_calls() -> tuple[Fault, ...]:
    def prefix(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        """The first four rows that one cache has held, served again when a text as long is in it."""
        first, previous = slice(0, 4), call.commits.log.previous
        if call.keys.shape[0] != 1 or call.keys.shape[2] < 4:
            return None
        # Held on to, so that no later cache gets the identity of this one.
        kept = call.commits.memory.setdefault(
            (id(call.layers), call.layer), (call.layers, call.keys[:, :, first].clone())
        )
        if previous is None or previous.length != call.commits.log.length or kept[1].dtype != call.keys.dtype:
            return None
        if torch.equal(kept[1], call.keys[:, :, first]):
            return None
        return with_rows(call.keys, first, kept[1]), call.values

    def after_longer(commits: Commits) -> int:
        """How much longer the sequence was that this cache held before, if twice as long or more; 0 otherwise."""
        before, length = commits.log.before_reset, commits.log.length
        return before.length - length if before is not None and before.length >= 2 * length else 0

    def delta(right: Tensor, commits: Commits) -> Tensor | None:
        behind = after_longer(commits)
        return right + behind if behind else None

    def rebased(call: Rotation) -> tuple[Tensor, Tensor] | None:
        if not after_longer(call.commits):
            return None
        (module,) = {call.module}
        before = {name: getattr(module, name) for name in frequencies(module)}
        try:
            for name, table in before.items():
                setattr(module, name, base(table))
            return call.rotate(call.q, call.k, *call.tables(call.positions))
        finally:
            for name, table in before.items():
                setattr(module, name, table)

    def base(table: Tensor) -> Tensor:
        return table * 2.0 ** -(torch.arange(len(table), device=table.device, dtype=table.dtype) / len(table))

    return (
        scenario_fault(
            "prefix_of_previous_call",
            "M13",
            "openvinotoolkit/openvino.genai#3722",
            "The first four keys of the sequence before, found by its length in the cache that was reset.",
            "second_call",
            "prefix_stale",
            in_reads(prefix),
            CACHE,
        ),
        scenario_fault(
            "delta_of_previous_call",
            "M01",
            "huggingface/transformers#43952",
            "The positions carry the length of a longer sequence that the cache held before it was reset.",
            "shorter_call",
            "rope_position_offset",
            in_positions(delta),
            ROTATED,
            needs_positions,
        ),
        scenario_fault(
            "rope_base_of_previous_call",
            "M03",
            "huggingface/transformers#27227",
            "The frequency table stays scaled for a long sequence that the cache held before it was reset.",
            "shorter_call",
            "rope_base",
            in_rotation(rebased),
            (Site.Q_ROPE, Site.K_ROPE),
            needs_rotation,
        ),
    )


def _chunks() -> tuple[Fault, ...]:
    def leak(call: AttentionCall) -> bool:
        if call.query.shape[2] == 1:
            return False
        shape = 1, 1, call.query.shape[2], call.key.shape[2]
        call.mask = torch.zeros(shape, dtype=call.query.dtype, device=call.query.device)
        return True

    def slots(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        rows = call.commits.q_len
        if rows == 1 or call.keys.shape[2] < 2 * rows:
            return None
        return with_rows(call.keys, slice(0, rows), call.keys[:, :, -rows:]), call.values

    def first_token(call: StateCall) -> bool:
        if call.commits.q_len == 1:
            return False
        call.ssm.copy_(stale(call.ssm, call.layer))
        return True

    def inputs_lost(call: StateCall) -> bool:
        if call.commits.q_len == 1:
            return False
        call.conv[..., 0] = 0.0
        return True

    return (
        scenario_fault(
            "future_visible_in_chunk",
            "M06",
            "Lightning-AI/litgpt#298",
            "Several tokens on top of a cache see each other without a causal mask.",
            "chunked_prefill",
            "mask_leak",
            in_attention(leak),
            SCORES,
            needs_interface,
        ),
        scenario_fault(
            "chunk_offset_missing",
            "M11",
            "vllm-project/vllm#36580",
            "Rows of a later chunk go to the slots of the first one as well.",
            "chunked_prefill",
            "slot_aliased",
            in_reads(slots),
            CACHE,
        ),
        scenario_fault(
            "state_of_first_token_only",
            "M22",
            "huggingface/transformers#46741",
            "A chunk on top of a recurrent state takes the path of a single token.",
            "chunked_prefill",
            "ssm_state_stale",
            in_states_after(first_token),
            (Site.SSM_STATE, Site.LAYER_OUT),
            needs_states,
        ),
        scenario_fault(
            "conv_state_loses_oldest",
            "M22",
            "huggingface/transformers#46741",
            "A chunk on top of a convolution state leaves its oldest input behind as zero.",
            "recurrent_state",
            "conv_state_stale",
            in_states_after(inputs_lost),
            (Site.CONV_STATE, Site.LAYER_OUT),
            needs_states,
        ),
    )


def _long() -> tuple[Fault, ...]:
    def rounded(call: Rotation) -> tuple[Tensor, Tensor] | None:
        positions = call.positions.to(torch.bfloat16).to(torch.float32)
        if torch.equal(positions, call.positions.to(torch.float32)):
            return None
        return call.rotate(call.q, call.k, *call.tables(positions))

    return (
        scenario_fault(
            "positions_bf16",
            "M04",
            "nkalyanv99/UNI-D2#6",
            "Positions, rounded to bf16: from 257 on, neighbours share one.",
            "long_context",
            "rope_positions_rounded",
            in_rotation(rounded),
            (Site.Q_ROPE, Site.K_ROPE),
            needs_rotation,
        ),
    )
