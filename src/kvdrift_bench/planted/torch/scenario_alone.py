"""Faults that strike only where one scenario goes: many chunks, a page begun twice, unlike padding, two sequences.

Each is found by one scenario and by no other, so that it shows what that scenario is there for.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.torch.cache import Rows, with_rows
from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.own import handed, split_of
from kvdrift_bench.planted.torch.parts import attention_modules, needs_cache, needs_interface
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.scenario_caches import PAGE
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, beside, in_attention, in_reads
from kvdrift_bench.planted.torch.ways_methods import in_method

_LOG2_E = 1.4426950408889634


@fault(needs_interface)
@in_attention
def later_chunks_are_merged_by_another_base(call: AttentionCall) -> Tensor | None:
    """Earlier chunks and the new one are attended to apart; the log-sums come to base 2, and are raised to e."""
    if not call.commits.log.is_later_chunk:
        return None
    n_keys, n_new = call.key.shape[2], call.query.shape[2]
    parts = [split_of(call, *bounds) for bounds in ((0, n_keys - n_new), (n_keys - n_new, n_keys))]
    logs = [(torch.log(total) + peak) * _LOG2_E for _, total, peak in parts]
    top = torch.maximum(*logs)
    weights = [torch.exp(log - top) for log in logs]
    out = sum(out / total * weight for (out, total, _), weight in zip(parts, weights, strict=True))
    return handed(call, out / (weights[0] + weights[1]))


# ------------------------------------------------------------------------------------------------ a page begun again


@in_method("crop")
def _noting_the_page(original: Any, commits: Commits, cache: Any, n: int) -> None:
    """A draft begins a page and is dropped whole: keep the first row of that page."""
    before, fed = cache.get_seq_length(), commits.log.calls[-1][1]
    edge = before // PAGE * PAGE
    if -n == fed and before + n <= edge < before:
        rows = [layer.keys[:, :, edge : edge + 1].clone() for layer in cache.layers]
        commits.memory["page"] = (cache.layers, edge, rows)
    original(cache, n)


@fault(needs_cache)
@beside(_noting_the_page)
@in_reads
def page_begun_again_keeps_a_draft_row(call: CacheCall) -> Rows | None:
    """The page is taken for one whose first row is written already."""
    layers, edge, rows = call.commits.memory.get("page", (None, 0, ()))
    if layers is not call.layers or call.keys.shape[2] <= edge:
        return None
    return with_rows(call.keys, slice(edge, edge + 1), rows[call.layer].to(call.keys.dtype)), call.values


# ------------------------------------------------------------------------------------------------------ unlike padding
# Rows are told apart by their masks [row, 1, token, key], whose first columns hide the padding.


@fault(needs_interface)
@in_attention
def padding_of_the_row_twice_as_far(call: AttentionCall) -> bool:
    if call.mask is None or call.mask.shape[0] < 3:
        return False
    n_rows = call.mask.shape[0]
    call.mask = call.mask[[2 * row if 2 * row < n_rows else row for row in range(n_rows)]]
    return True


@fault(needs_interface)
@in_attention
def one_token_prompt_taken_for_decode(call: AttentionCall) -> bool:
    """A row of the prefill that had one token is taken for a decode step, which has no padding."""
    if call.mask is None or call.mask.shape[0] == 1:
        return False
    shown = call.mask if call.mask.dtype == torch.bool else call.mask == 0.0
    n_pads = (~shown[:, 0, -1]).int().cumprod(-1).sum(-1)
    n_prefill = call.commits.log.calls[0][1]
    taken = (n_pads > 0) & (n_pads == n_prefill - 1)
    if not bool(taken.any()):
        return False
    mask = call.mask.clone()
    mask[taken] = True if mask.dtype == torch.bool else 0.0
    call.mask = mask
    return True


# ------------------------------------------------------------------------------------------------------ two sequences
# What is shared is kept once for all sequences, so that one of them reads what another has left there.


def sharing_layers(model: nn.Module) -> list[int]:
    """Return the layers that read the keys and values of another layer."""
    modules = attention_modules(model).items()
    return [layer for layer, module in modules if getattr(module, "is_kv_shared_layer", False)]


def first_sharing(model: nn.Module) -> int:
    """Return the first layer that reads the keys and values of another."""
    return sharing_layers(model)[0]


def needs_sharing(model: nn.Module) -> str | None:
    """Layers that read the keys and values of another."""
    return None if sharing_layers(model) else "no layer reads the keys and values of another"


def _left_by_another(call: AttentionCall) -> Rows | None:
    """Keys and values of the sequence that ran in between, if it is as long as this one."""
    if not getattr(call.module, "is_kv_shared_layer", False):
        return None
    log = call.commits.log
    left = call.commits.memory.get(call.layer)
    call.commits.memory[call.layer] = (log, call.key.clone(), call.value.clone())
    between = log.between
    if between is None or left is None or left[0] is not between or left[1].shape != call.key.shape:
        return None
    # A copy of a cache goes on with the prefix that it shares, and is not a sequence of its own.
    apart = between.calls[0][0] == log.calls[0][0] == 0
    return (left[1], left[2]) if apart and between.length == log.length else None


@fault(needs_sharing, first=first_sharing)
@in_attention
def shared_layer_reads_the_keys_of_another_sequence(call: AttentionCall) -> bool:
    left = _left_by_another(call)
    if left is not None:
        call.key = left[0]
    return left is not None


@fault(needs_sharing, first=first_sharing)
@in_attention
def shared_layer_takes_a_value_of_another_sequence(call: AttentionCall) -> bool:
    left = _left_by_another(call)
    if left is not None:
        call.value = with_rows(call.value, slice(-1, None), left[1][:, :, -1:])
    return left is not None
