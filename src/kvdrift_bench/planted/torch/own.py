"""An attention function of our own, from one call's operands: what faults in the arithmetic and clean twins start from.

Written for a few query tokens on top of a cache, with an additive or boolean mask, a soft cap and sinks where the
model has them.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall


def repeated(call: AttentionCall, heads: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Return keys and values with one head for each query head; `heads` names the kv head of each of them."""
    n_heads, n_kv = call.query.shape[1], call.key.shape[1]
    order = [head // (n_heads // n_kv) for head in range(n_heads)] if heads is None else heads
    return call.key[:, order], call.value[:, order]


def additive(call: AttentionCall, dtype: torch.dtype) -> Tensor | None:
    """Return the mask as numbers to add, causal at the bottom right if the call has none."""
    mask, keys, rows = call.mask, call.key.shape[2], call.query.shape[2]
    if mask is None:
        if rows == 1:
            return None
        index = torch.arange(keys, device=call.key.device)
        mask = (index[None, :] <= index[-rows:, None])[None, None]
    mask = mask[..., :keys]
    if mask.dtype == torch.bool:
        hidden = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return hidden.masked_fill(~mask, torch.finfo(dtype).min)
    return mask.to(dtype)


def scores_of(call: AttentionCall, keys: Tensor | None = None, *, masked: bool = True) -> Tensor:
    """Return scaled, capped and masked scores [1, head, token, key], in float32 or wider."""
    keys = repeated(call)[0] if keys is None else keys
    scores = torch.matmul(wide(call.query), wide(keys).transpose(2, 3)) * call.scale
    cap = call.options.get("softcap")
    if cap is not None:
        scores = cap * torch.tanh(scores / cap)
    mask = additive(call, scores.dtype) if masked else None
    return scores if mask is None else scores + mask


def sink_of(call: AttentionCall) -> Tensor | None:
    """Return the sinks as one more score [1, head, 1, 1], None if the model has none."""
    sinks = getattr(call.module, "sinks", None)
    return None if sinks is None else wide(sinks.detach()).reshape(1, -1, 1, 1)


def with_sink(call: AttentionCall, scores: Tensor) -> Tensor:
    """Return the scores with the sink as their last key, where the model has sinks."""
    sink = sink_of(call)
    if sink is None:
        return scores
    return torch.cat([scores, sink.expand(*scores.shape[:3], 1)], dim=-1)


def softmax_of(call: AttentionCall, scores: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return the probabilities of the keys, sinks taken into account, computed in `dtype` or that of the scores."""
    rows = with_sink(call, scores)
    return F.softmax(rows if dtype is None else rows.to(dtype), dim=-1)[..., : scores.shape[-1]]


def context(call: AttentionCall, probs: Tensor, values: Tensor | None = None) -> Tensor:
    """Return [1, token, head, dim], what an attention function of transformers hands back."""
    values = repeated(call)[1] if values is None else values
    out = torch.matmul(probs.to(call.query.dtype), values.to(call.query.dtype))
    return out.transpose(1, 2).contiguous()


def attend(call: AttentionCall, heads: list[int] | None = None) -> Tensor:
    """Return the context of plain attention; `heads` names the kv head of each query head."""
    keys, values = repeated(call, heads)
    return context(call, softmax_of(call, scores_of(call, keys)), values)


def split_of(call: AttentionCall, start: int, stop: int, *, sink: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Return what one split of the keys yields: unnormalised output, sum of weights, largest score.

    The sum is taken by `exp`, as a split-K kernel does, so that no call of softmax is seen from outside.
    """
    values = repeated(call)[1]
    scores = scores_of(call)[..., start:stop]
    peak = scores.amax(-1, keepdim=True)
    found = sink_of(call) if sink else None
    if found is not None:
        peak = torch.maximum(peak, found)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if found is not None:
        total = total + torch.exp(found - peak)
    return torch.matmul(weights, wide(values[:, :, start:stop])), total, peak


def merged(call: AttentionCall, splits: list[tuple[int, int]]) -> Tensor:
    """Return the context of attention computed split by split and merged by their log-sum-exp."""
    parts = [split_of(call, start, stop, sink=index == 0) for index, (start, stop) in enumerate(splits)]
    peak = torch.stack([part[2] for part in parts]).amax(0)
    weights = [torch.exp(part[2] - peak) for part in parts]
    out = torch.stack([part[0] * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
    total = torch.stack([part[1] * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
    return handed(call, out / total)


def split_in(call: AttentionCall, n_splits: int) -> list[tuple[int, int]]:
    """Return the bounds of `n_splits` splits of the keys, or of fewer if there are not so many keys."""
    n_keys = call.key.shape[2]
    n_splits = min(n_splits, n_keys)
    edges = [n_keys * index // n_splits for index in range(n_splits + 1)]
    return list(pairwise(edges))


def handed(call: AttentionCall, out: Tensor) -> Tensor:
    """Return an output [1, head, token, dim] as an attention function hands it back: in the query's dtype."""
    return out.to(call.query.dtype).transpose(1, 2).contiguous()
