"""Faults of attention kernels: which kv head a query head reads, and how splits of the keys are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.attention import attention_fault
from kvdrift_bench.planted.torch.model import Fault
from kvdrift_bench.planted.torch.own import attend, context, handed, scores_of, split_in, split_of
from kvdrift_bench.planted.torch.parts import needs_groups
from kvdrift_bench.planted.torch.ways import AttentionCall, AttentionChange

_CONTEXT = (Site.ATTN_CTX, Site.ATTN_OUT)
_GHOST_MASS = 0.02


def kernel_faults() -> tuple[Fault, ...]:
    """Return the faults of attention kernels, planted in every layer."""
    return (*_heads(), *_merges())


def _heads() -> tuple[Fault, ...]:
    def tiled(call: AttentionCall) -> Tensor:
        return attend(call, [head % call.key.shape[1] for head in range(call.query.shape[1])])

    def one_wrong(call: AttentionCall) -> Tensor:
        group = call.query.shape[1] // call.key.shape[1]
        heads = [head // group for head in range(call.query.shape[1])]
        heads[-1] = 0
        return attend(call, heads)

    def groups_of_eight(call: AttentionCall) -> Tensor:
        return attend(call, [min(head // 8, call.key.shape[1] - 1) for head in range(call.query.shape[1])])

    def fault(name: str, reference: str, where: str, cause: str, change: AttentionChange) -> Fault:
        return attention_fault(name, "M16", reference, where, cause, change, applies=needs_groups)

    return (
        fault(
            "heads_tiled",
            "ekzhang/jax-js#180",
            "Query head h reads kv head h mod n, in every layer.",
            "heads_tiled",
            tiled,
        ),
        fault(
            "last_head_reads_first_group",
            "FlashML-org/FreeToken#177",
            "The last query head of every layer reads kv head 0.",
            "head_group_wrong",
            one_wrong,
        ),
        fault(
            "group_of_eight_assumed",
            "ikawrakow/ik_llama.cpp#1521",
            "Query head h reads kv head h div 8, in every layer.",
            "group_size_wrong",
            groups_of_eight,
        ),
    )


def _merges() -> tuple[Fault, ...]:
    def merge(
        name: str, reference: str, where: str, cause: str, change: AttentionChange, also: tuple[str, ...] = ()
    ) -> Fault:
        return attention_fault(name, "M21", reference, where, cause, change, sites=_CONTEXT, also=also)

    def halves(call: AttentionCall) -> list[tuple[Tensor, Tensor, Tensor]]:
        return [split_of(call, *bounds) for bounds in split_in(call, 2)]

    def normalised_apart(call: AttentionCall) -> Tensor:
        parts = halves(call)
        return handed(call, torch.stack([out / total for out, total, _ in parts]).sum(0))

    def weighted_alike(call: AttentionCall) -> Tensor:
        parts = halves(call)
        return handed(call, torch.stack([out / total for out, total, _ in parts]).mean(0))

    def peak_forgotten(call: AttentionCall) -> Tensor:
        outs, totals, _ = zip(*halves(call), strict=True)
        return handed(call, torch.stack(outs).sum(0) / torch.stack(totals).sum(0))

    def ghost(call: AttentionCall) -> Tensor:
        return context(call, _without_softmax(call) * (1.0 - _GHOST_MASS))

    def base_two(call: AttentionCall) -> Tensor:
        """The sums come as log2, and are raised with base e."""
        parts = halves(call)
        logs = [(torch.log(total) + peak) * 1.4426950408889634 for _, total, peak in parts]
        top = torch.stack(logs).amax(0)
        weights = [torch.exp(log - top) for log in logs]
        out = torch.stack([out / total * weight for (out, total, _), weight in zip(parts, weights, strict=True)])
        return handed(call, out.sum(0) / torch.stack(weights).sum(0))

    return (
        merge(
            "splits_normalised_apart",
            "AI-Hypercomputer/maxtext#391",
            "Two splits of the keys, each normalised by itself and then added.",
            "chunk_merge",
            normalised_apart,
        ),
        merge(
            "splits_weighted_alike",
            "vllm-project/vllm#26042",
            "Two splits of the keys, merged with equal weights.",
            "chunk_merge",
            weighted_alike,
        ),
        merge(
            "split_peaks_forgotten",
            "vllm-project/vllm#52909",
            "Two splits of the keys, merged without the difference of their largest scores.",
            "chunk_merge",
            peak_forgotten,
        ),
        merge(
            "split_sums_of_another_base",
            "local-inference-lab/vllm#17",
            "Two splits of the keys, merged with log-sums of base 2 taken for natural ones.",
            "chunk_merge",
            base_two,
        ),
        merge(
            "ghost_split",
            "sgl-project/sglang#22688",
            "An empty split, merged with a weight of 2 %.",
            "ghost_chunk",
            ghost,
            # (1 - w) sum_j p_j v_j = sum_j p_j ((1 - w) v_j): a weight w that goes nowhere and values that are too
            # small by w give the same context.
            ("v_scale",),
        ),
    )


def _without_softmax(call: AttentionCall) -> Tensor:
    """Return the probabilities by `exp`, so that only the context is seen to be wrong, where the fault is."""
    _, total, peak = split_of(call, 0, call.key.shape[2], sink=True)
    return torch.exp(scores_of(call) - peak) / total
