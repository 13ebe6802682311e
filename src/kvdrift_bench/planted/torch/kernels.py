"""Faults of attention kernels: which kv head a query head reads, and how splits of the keys are merged."""

from __future__ import annotations

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.own import attend, context, handed, scores_of, split_in, split_of
from kvdrift_bench.planted.torch.parts import needs_groups, needs_interface
from kvdrift_bench.planted.torch.registry import fault
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention

_GHOST_MASS = 0.02


@fault(needs_groups)
@in_attention
def heads_tiled(call: AttentionCall) -> Tensor:
    return attend(call, [head % call.key.shape[1] for head in range(call.query.shape[1])])


@fault(needs_groups)
@in_attention
def last_head_reads_first_group(call: AttentionCall) -> Tensor:
    group = call.query.shape[1] // call.key.shape[1]
    heads = [head // group for head in range(call.query.shape[1])]
    heads[-1] = 0
    return attend(call, heads)


@fault(needs_groups)
@in_attention
def group_of_eight_assumed(call: AttentionCall) -> Tensor:
    return attend(call, [min(head // 8, call.key.shape[1] - 1) for head in range(call.query.shape[1])])


def _halves(call: AttentionCall) -> list[tuple[Tensor, Tensor, Tensor]]:
    """What two splits of the keys yield: unnormalised output, sum of weights, largest score."""
    return [split_of(call, *bounds) for bounds in split_in(call, 2)]


@fault(needs_interface)
@in_attention
def splits_normalised_apart(call: AttentionCall) -> Tensor:
    return handed(call, torch.stack([out / total for out, total, _ in _halves(call)]).sum(0))


@fault(needs_interface)
@in_attention
def splits_weighted_alike(call: AttentionCall) -> Tensor:
    return handed(call, torch.stack([out / total for out, total, _ in _halves(call)]).mean(0))


@fault(needs_interface)
@in_attention
def split_peaks_forgotten(call: AttentionCall) -> Tensor:
    outs, totals, _ = zip(*_halves(call), strict=True)
    return handed(call, torch.stack(outs).sum(0) / torch.stack(totals).sum(0))


@fault(needs_interface)
@in_attention
def split_sums_of_another_base(call: AttentionCall) -> Tensor:
    """The sums come as log2, and are raised with base e."""
    parts = _halves(call)
    logs = [(torch.log(total) + peak) * 1.4426950408889634 for _, total, peak in parts]
    top = torch.stack(logs).amax(0)
    weights = [torch.exp(log - top) for log in logs]
    out = torch.stack([out / total * weight for (out, total, _), weight in zip(parts, weights, strict=True)])
    return handed(call, out.sum(0) / torch.stack(weights).sum(0))


@fault(needs_interface)
@in_attention
def ghost_split(call: AttentionCall) -> Tensor:
    """By `exp` instead of softmax, so that only the context is seen to be wrong, where the fault is."""
    _, total, peak = split_of(call, 0, call.key.shape[2], sink=True)
    return context(call, torch.exp(scores_of(call) - peak) / total * (1.0 - _GHOST_MASS))
