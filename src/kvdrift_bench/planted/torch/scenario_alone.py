"""Faults that strike only where one scenario goes: many chunks, a page begun twice, unlike padding, two sequences.

Each is found by one scenario and by no other, so that it shows what that scenario is there for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import with_rows
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.own import handed, split_of
from kvdrift_bench.planted.torch.parts import attention_modules, needs_interface
from kvdrift_bench.planted.torch.scenario_caches import PAGE, in_method
from kvdrift_bench.planted.torch.scenario_fault import SCORES, scenario_fault
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, in_attention, in_reads

_LOG2_E = 1.4426950408889634


def lone_faults() -> tuple[Fault, ...]:
    """Return the faults that one scenario alone finds."""
    return (_merged_chunks(), _page_begun_again(), *_padding(), *_two_sequences())


def _merged_chunks() -> Fault:
    def base_two(call: AttentionCall) -> Tensor | None:
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

    return scenario_fault(
        "later_chunks_are_merged_by_another_base",
        "M21",
        "sgl-project/sglang#40903",
        "From the fourth chunk on, history and new tokens are merged with log-sums of base 2 taken for natural ones.",
        "chunked_prefill",
        "chunk_merge",
        in_attention(base_two),
        (Site.ATTN_CTX, Site.ATTN_OUT),
        needs_interface,
    )


def _page_begun_again() -> Fault:
    """A draft begins a page and is dropped whole; the page is taken for one whose first row is written already."""

    def keep(original: Any, commits: Commits, cache: Any, n: int) -> None:
        before, fed = cache.get_seq_length(), commits.log.calls[-1][1]
        edge = before // PAGE * PAGE
        if -n == fed and before + n <= edge < before:
            rows = [layer.keys[:, :, edge : edge + 1].clone() for layer in cache.layers]
            commits.memory["page"] = (cache.layers, edge, rows)
        original(cache, n)

    def stale_row(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        layers, edge, rows = call.commits.memory.get("page", (None, 0, ()))
        if layers is not call.layers or call.keys.shape[2] <= edge:
            return None
        return with_rows(call.keys, slice(edge, edge + 1), rows[call.layer].to(call.keys.dtype)), call.values

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        with in_method("crop", keep)(model, commits), in_reads(stale_row)(model, commits):
            yield

    return scenario_fault(
        "page_begun_again_keeps_a_draft_row",
        "M12",
        "NVIDIA/TensorRT-LLM#16448",
        "A draft that began a page of 16 slots is dropped whole, and its key stays the first of that page.",
        "rewind_edge",
        "rewind_residue",
        way,
        (Site.K_CACHE,),
    )


def _padding() -> tuple[Fault, ...]:
    """Rows are told apart by their masks [row, 1, token, key], whose first columns hide the padding."""

    def visible(mask: Tensor) -> Tensor:
        return mask if mask.dtype == torch.bool else mask == 0.0

    def another_row(call: AttentionCall) -> bool:
        if call.mask is None or call.mask.shape[0] < 3:
            return False
        n_rows = call.mask.shape[0]
        call.mask = call.mask[[2 * row if 2 * row < n_rows else row for row in range(n_rows)]]
        return True

    def one_token_prompt(call: AttentionCall) -> bool:
        """A row of the prefill that had one token is taken for a decode step, which has no padding."""
        if call.mask is None or call.mask.shape[0] == 1:
            return False
        shown = visible(call.mask)
        n_pads = (~shown[:, 0, -1]).int().cumprod(-1).sum(-1)
        n_prefill = call.commits.log.calls[0][1]
        taken = (n_pads > 0) & (n_pads == n_prefill - 1)
        if not bool(taken.any()):
            return False
        mask = call.mask.clone()
        mask[taken] = True if mask.dtype == torch.bool else 0.0
        call.mask = mask
        return True

    def fault(name: str, reference: str, where: str, cause: str, change: Callable[[AttentionCall], bool]) -> Fault:
        way = in_attention(change)
        return scenario_fault(name, "M08", reference, where, "batch_padded", cause, way, SCORES, needs_interface)

    return (
        fault(
            "padding_of_the_row_twice_as_far",
            "invergent-ai/surogate#110",
            "The offset of a row is added twice where its padding mask is looked up: row 1 is masked as row 2.",
            "history_lost",
            another_row,
        ),
        fault(
            "one_token_prompt_taken_for_decode",
            "vllm-project/vllm-ascend#5583",
            "A row whose prompt has one token is taken for one that decodes, and sees its padding.",
            "mask_leak",
            one_token_prompt,
        ),
    )


def sharing_layers(model: nn.Module) -> list[int]:
    """Return the layers that read the keys and values of another layer."""
    modules = attention_modules(model).items()
    return [layer for layer, module in modules if getattr(module, "is_kv_shared_layer", False)]


def needs_sharing(model: nn.Module) -> str | None:
    """Layers that read the keys and values of another."""
    return None if sharing_layers(model) else "no layer reads the keys and values of another"


def _two_sequences() -> tuple[Fault, ...]:
    """What is shared is kept once for all sequences, so that one of them reads what another has left there."""

    def left_by_another(call: AttentionCall) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the sequence that ran in between, if it is as long as this one."""
        if not getattr(call.module, "is_kv_shared_layer", False):
            return None
        log = call.commits.log
        left = call.commits.memory.get(call.layer)
        call.commits.memory[call.layer] = (log, call.key.clone(), call.value.clone())
        between = log.between
        if between is None or left is None or left[0] is not between or left[1].shape != call.key.shape:
            return None
        # A copy of a cache goes on with the prefix that it shares, and is no sequence of its own.
        apart = between.calls[0][0] == log.calls[0][0] == 0
        return (left[1], left[2]) if apart and between.length == log.length else None

    def keys(call: AttentionCall) -> bool:
        left = left_by_another(call)
        if left is not None:
            call.key = left[0]
        return left is not None

    def newest_value(call: AttentionCall) -> bool:
        left = left_by_another(call)
        if left is not None:
            call.value = with_rows(call.value, slice(-1, None), left[1][:, :, -1:])
        return left is not None

    def fault(name: str, where: str, cause: str, change: Callable[[AttentionCall], bool], *sites: Site) -> Fault:
        way, reference = in_attention(change), "ggml-org/llama.cpp#27994"
        return scenario_fault(
            name,
            "M15",
            reference,
            where,
            "shared_kv",
            cause,
            way,
            sites,
            needs_sharing,
            lambda model: sharing_layers(model)[0],
        )

    return (
        fault(
            "shared_layer_reads_the_keys_of_another_sequence",
            "Layers that share keys read those of a sequence as long as theirs that ran in between.",
            "batch_row_wrong",
            keys,
            Site.K_CACHE,
            Site.ATTN_SCORES,
            Site.ATTN_PROBS,
        ),
        fault(
            "shared_layer_takes_a_value_of_another_sequence",
            "Layers that share values read the newest from a sequence as long as theirs that ran in between.",
            "batch_row_wrong",
            newest_value,
            Site.V_CACHE,
            Site.ATTN_CTX,
        ),
    )
