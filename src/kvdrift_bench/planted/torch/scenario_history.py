"""Faults that strike only after a certain history of a sequence: the third chunk, a bonus token, drafts fed again.

Each needs what only one scenario does, so that it shows that the scenario earns its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import with_rows
from kvdrift_bench.planted.torch.model import Fault
from kvdrift_bench.planted.torch.parts import needs_interface, needs_rotation, needs_states
from kvdrift_bench.planted.torch.scenario_fault import SCORES, scenario_fault
from kvdrift_bench.planted.torch.ways import (
    AttentionCall,
    CacheCall,
    Rotation,
    Way,
    in_attention,
    in_reads,
    in_rotation,
)
from kvdrift_bench.planted.torch.ways_modules import StateCall, in_states_after, in_states_before

_TILE = 4  # queries that a kernel takes at once
_SWITCH = 24  # tokens behind which the carrier of the scenario `rope_switch` changes its tables


def history_faults() -> tuple[Fault, ...]:
    """Return the faults that depend on what a sequence, or the one before it, did earlier."""
    return (*_chunks(), *_drafts(), *_batches(), *_twins(), *_states(), *_switches())


def _ahead(call: AttentionCall, seeing: slice) -> bool:
    """Let the queries `seeing` see all keys, and the others what they may."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    mask = torch.full((rows, keys), -torch.inf, dtype=call.query.dtype, device=call.query.device)
    mask = mask.triu(keys - rows + 1)
    mask[seeing] = 0.0
    call.mask = mask[None, None]
    return True


def _chunks() -> tuple[Fault, ...]:
    def later_chunk(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        if not call.commits.log.is_later_chunk or call.keys.shape[2] < 4:
            return None
        return with_rows(call.keys, slice(0, 2), call.keys[:, :, -2:]), call.values

    def odd_tail(call: AttentionCall) -> bool:
        rows = call.query.shape[2]
        tail = rows % _TILE
        return _ahead(call, slice(rows - tail, None)) if rows > _TILE and tail > 1 else False

    return (
        scenario_fault(
            "later_chunks_take_the_first_slots",
            "M11",
            "vllm-project/vllm#36580",
            "From the fourth chunk on, the newest keys go to the slots of the first chunk as well.",
            "chunked_prefill",
            "slot_aliased",
            in_reads(later_chunk),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "odd_tail_of_a_chunk_sees_ahead",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "Queries that do not fill the last tile of four are not masked.",
            "chunked_prefill",
            "mask_leak",
            in_attention(odd_tail),
            SCORES,
            needs_interface,
        ),
    )


def _drafts() -> tuple[Fault, ...]:
    def bonus(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        log = call.commits.log
        before, fed = log.call_before
        if call.commits.q_len > 1 or before == 0 or fed < _TILE or log.went_back or call.keys.shape[2] < 3:
            return None
        newest = call.keys.shape[2] - 1
        return with_rows(call.keys, slice(newest - 1, newest), call.keys[:, :, newest - 2 : newest - 1]), call.values

    def one_ahead(call: AttentionCall) -> bool:
        rows = call.query.shape[2]
        return _ahead(call, slice(rows - 2, None)) if rows == 2 * _TILE else False

    def fed_again(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        """The slot of the first token fed after a rewind is taken for one that is written."""
        log, q_len = call.commits.log, call.commits.q_len
        if q_len == 1 or len(log.calls) < 2 or not log.went_back:
            return None
        first = call.values.shape[2] - q_len
        row = slice(first, first + 1)
        return call.keys, with_rows(call.values, row, torch.zeros_like(call.values[:, :, row]))

    return (
        scenario_fault(
            "bonus_token_reads_a_draft_twice",
            "M12",
            "vllm-project/vllm#9730",
            "After four or more accepted drafts, the key of the last one is that of the draft before it.",
            "verify",
            "slot_aliased",
            in_reads(bonus),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "full_draft_sees_ahead",
            "M06",
            "sgl-project/sgl-kernel-xpu#196",
            "Of eight drafts verified at once, the last but one sees the last.",
            "verify",
            "mask_leak",
            in_attention(one_ahead),
            SCORES,
            needs_interface,
        ),
        scenario_fault(
            "drafts_fed_again_are_not_written",
            "M12",
            "xLLM-AI/xllm#1944",
            "The first value of several tokens that come in the place of dropped ones is not written.",
            "rewind",
            "slot_zeroed",
            in_reads(fed_again),
            (Site.V_CACHE,),
        ),
    )


def _batches() -> tuple[Fault, ...]:
    """A smaller batch behind a larger one: what was laid out for the larger one is still in use."""

    def shrunk(call: CacheCall) -> bool:
        previous = call.commits.log.previous
        return previous is not None and 1 < call.commits.log.n_rows < previous.n_rows

    def old_rows(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        kept: dict[tuple[int, torch.dtype], Tensor] = call.commits.memory
        key = call.layer, call.keys.dtype
        if not shrunk(call):
            kept[key] = call.keys.clone()
            return None
        stale = kept.get(key)
        n_rows = call.keys.shape[0]
        if stale is None or stale.shape[0] <= n_rows or min(stale.shape[2], call.keys.shape[2]) < 2:
            return None
        return with_rows(call.keys, slice(0, 2), stale[:n_rows, :, :2]), call.values

    def old_stride(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        return (call.keys, call.values.roll(1, 0)) if shrunk(call) else None

    return (
        scenario_fault(
            "rows_of_a_larger_batch_stay",
            "M11",
            "turboderp/exllama#182",
            "A batch of fewer rows than the one before it reads two keys of that one.",
            "batch",
            "batch_row_wrong",
            in_reads(old_rows),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "row_numbers_of_a_larger_batch_stay",
            "M23",
            "PaddlePaddle/PaddleNLP#6672",
            "A batch of fewer rows than the one before it reads the values of neighbouring rows.",
            "batch",
            "batch_row_wrong",
            in_reads(old_stride),
            (Site.V_CACHE,),
        ),
    )


def _twins() -> tuple[Fault, ...]:
    """Rows that hold the same tokens share their blocks, and what one of them writes is lost for the other."""

    def second_twin(call: CacheCall) -> int | None:
        rows = call.keys
        for second in range(1, rows.shape[0]):
            # Keys of other tokens differ by far more than rounding.
            if any(torch.allclose(rows[first], rows[second], rtol=1e-2, atol=1e-3) for first in range(second)):
                return second
        return None

    def changed(rows: Tensor, second: int, slots: slice, value: Tensor) -> Tensor:
        rows = rows.clone()
        rows[second, :, slots] = value
        return rows

    def not_written(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        second = second_twin(call)
        if second is None:
            return None
        last = slice(call.values.shape[2] - 1, None)
        return call.keys, changed(call.values, second, last, torch.zeros_like(call.values[second, :, last]))

    def written_twice(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        second = second_twin(call)
        if second is None or call.keys.shape[2] < 3:
            return None
        before = slice(call.keys.shape[2] - 2, call.keys.shape[2] - 1)
        return changed(call.keys, second, before, call.keys[second, :, -1:]), call.values

    return (
        scenario_fault(
            "twin_rows_share_a_block_unwritten",
            "M13",
            "openvinotoolkit/openvino.genai#3722",
            "Of two rows of the same tokens, the newest value of the second is not written.",
            "duplicate_rows",
            "slot_zeroed",
            in_reads(not_written),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "twin_rows_write_one_block_twice",
            "M11",
            "huggingface/text-generation-inference#2711",
            "Of two rows of the same tokens, the newest key of the second also takes the slot before its own.",
            "duplicate_rows",
            "slot_aliased",
            in_reads(written_twice),
            (Site.K_CACHE,),
        ),
    )


def _states() -> tuple[Fault, ...]:
    def behind_a_step(call: StateCall) -> bool:
        """Two tokens are two steps; three or more are a chunk."""
        return call.commits.q_len > 2 and call.commits.log.call_before[1] == 1

    def turned(call: StateCall) -> bool:
        if not behind_a_step(call) or call.ssm.shape[-1] != call.ssm.shape[-2]:
            return False
        call.ssm.copy_(call.ssm.transpose(-1, -2).clone())
        return True

    def just_full(call: StateCall) -> bool:
        if call.commits.q_len != call.module.conv_kernel_size - 1:
            return False
        call.conv[..., -1] = 0.0
        return True

    return (
        scenario_fault(
            "state_turned_between_step_and_chunk",
            "M22",
            "vllm-project/vllm#41292",
            "A state that a single step left behind is read transposed by a chunk of three or more tokens.",
            "recurrent_state",
            "ssm_state_stale",
            in_states_before(turned),
            (Site.SSM_STATE, Site.LAYER_OUT),
            needs_states,
        ),
        scenario_fault(
            "chunk_that_fills_the_window_loses_its_last",
            "M22",
            "vllm-project/vllm#56196",
            "A chunk of just as many tokens as the convolution looks back leaves its last input behind as zero.",
            "recurrent_state",
            "conv_state_stale",
            in_states_after(just_full),
            (Site.CONV_STATE, Site.LAYER_OUT),
            needs_states,
        ),
    )


def _switches() -> tuple[Fault, ...]:
    """Where another table begins: the token at that length, and the rows that were cached below it."""

    def at_switch(change: Any) -> Any:
        def apply(call: Rotation) -> tuple[Tensor, Tensor] | None:
            if call.commits.past != _SWITCH:
                return None
            result: tuple[Tensor, Tensor] = change(call)
            return result

        return apply

    def other_table(call: Rotation) -> tuple[Tensor, Tensor]:
        return call.rotate(call.q, call.k, *call.tables(call.positions * 2))

    def keys_recomputed(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        if not _SWITCH <= call.commits.past <= _SWITCH + 2 or call.keys.shape[2] < _SWITCH:
            return None
        return with_rows(call.keys, slice(0, _SWITCH), call.keys[:, :, :_SWITCH].roll(1, 2)), call.values

    def read(way: Any) -> Way:
        return in_reads(way)

    return (
        scenario_fault(
            "first_token_behind_the_switch_uses_both_tables",
            "M03",
            "huggingface/transformers#33129",
            "The first token behind the length at which tables change is rotated by another table.",
            "rope_switch",
            "rope_base",
            in_rotation(at_switch(other_table)),
            (Site.Q_ROPE, Site.K_ROPE),
            needs_rotation,
        ),
        scenario_fault(
            "keys_recomputed_at_the_switch_are_shifted",
            "M03",
            "microsoft/onnxruntime-genai#1161",
            "Keys that are computed anew when the tables change are put one slot behind their place.",
            "rope_switch",
            "slot_shifted",
            read(keys_recomputed),
            (Site.K_CACHE,),
        ),
    )
