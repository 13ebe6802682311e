"""Clean twins: decode steps computed in another correct way, which must never be called a mismatch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift_bench.planted.torch.own import (
    additive,
    attend,
    context,
    handed,
    merged,
    repeated,
    scores_of,
    softmax_of,
    split_in,
    with_sink,
)
from kvdrift_bench.planted.torch.parts import needs_alibi, needs_groups, needs_interface, needs_sinks
from kvdrift_bench.planted.torch.registry import twin, twins
from kvdrift_bench.planted.torch.ways import AttentionCall, Way, in_attention
from kvdrift_bench.planted.torch.ways_modules import in_argument

_LOG2_E = 1.4426950408889634


def _needs_no_cap(model: Any) -> str | None:
    """Plain scores: no cap, no sinks."""
    if getattr(model.config, "attn_logit_softcapping", None) or needs_sinks(model) is None:
        return "scores are capped, or there are sinks"
    return needs_interface(model)


def _needs_no_sink_groups(model: Any) -> str | None:
    """Grouped heads with plain scores."""
    return _needs_no_cap(model) or needs_groups(model)


# ------------------------------------------------------------------------------------------------------ kernels


@twin(needs_interface)
@in_attention
def own_attention(call: AttentionCall) -> Tensor:
    return attend(call)


@twin(needs_interface)
@in_attention
def heads_one_by_one(call: AttentionCall) -> Tensor:
    keys, values = repeated(call)
    rows = softmax_of(call, scores_of(call, keys)).to(call.query.dtype)
    outs = [rows[:, head] @ values[:, head].to(rows.dtype) for head in range(rows.shape[1])]
    return torch.stack(outs, dim=2).contiguous()


@twin(_needs_no_sink_groups)
@in_attention
def groups_packed_in_float64(call: AttentionCall) -> Tensor:
    """Queries of a group stand where a kernel has its token axis."""
    n_kv, dim = call.key.shape[1], call.query.shape[-1]
    rows = call.query.shape[2]
    packed = call.query.reshape(1, n_kv, -1, dim).double()
    scores = (packed @ call.key.double().transpose(2, 3)) * call.scale
    scores = scores.reshape(1, -1, rows, call.key.shape[2])
    mask = additive(call, scores.dtype)
    probs = torch.exp(torch.log_softmax(scores if mask is None else scores + mask, dim=-1))
    out = probs.reshape(1, n_kv, -1, call.key.shape[2]) @ call.value.double()
    return handed(call, out.reshape(1, -1, rows, out.shape[-1]))


@twin(needs_interface)
@in_attention
def log_softmax(call: AttentionCall) -> Tensor:
    rows = with_sink(call, scores_of(call))
    return context(call, torch.exp(torch.log_softmax(rows, dim=-1))[..., : call.key.shape[2]])


@twin(needs_interface)
@in_attention
def softmax_by_exp2(call: AttentionCall) -> Tensor:
    rows = with_sink(call, scores_of(call)) * _LOG2_E
    weights = torch.exp2(rows - rows.amax(-1, keepdim=True))
    return context(call, (weights / weights.sum(-1, keepdim=True))[..., : call.key.shape[2]])


@twin(needs_interface)
@in_attention
def divided_last(call: AttentionCall) -> Tensor:
    rows = with_sink(call, scores_of(call))
    weights = torch.exp(rows - rows.amax(-1, keepdim=True))
    values = repeated(call)[1].to(weights.dtype)
    return handed(call, weights[..., : values.shape[2]] @ values / weights.sum(-1, keepdim=True))


@twin(_needs_no_cap)
@in_attention
def product_and_sum(call: AttentionCall) -> Tensor:
    keys, values = repeated(call)
    wide = call.query.double() if call.query.dtype == torch.float64 else call.query.float()
    scores = (wide[:, :, :, None] * keys[:, :, None].to(wide.dtype)).sum(-1) * call.scale
    mask = additive(call, scores.dtype)
    return context(call, F.softmax(scores if mask is None else scores + mask, dim=-1), values)


@twin(_needs_no_cap)
@in_attention
def math_kernel(call: AttentionCall) -> Tensor:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    keys, values = repeated(call)
    with sdpa_kernel(SDPBackend.MATH):
        out = F.scaled_dot_product_attention(
            call.query, keys, values, attn_mask=additive(call, call.query.dtype), scale=call.scale
        )
    return out.transpose(1, 2).contiguous()


@twin(_needs_no_cap)
@in_attention
def batch_of_three_rows(call: AttentionCall) -> Tensor:
    keys, values = repeated(call)
    q, k, v = (tensor.expand(3, *tensor.shape[1:]).contiguous() for tensor in (call.query, keys, values))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=additive(call, call.query.dtype), scale=call.scale)
    return out[:1].transpose(1, 2).contiguous()


@twin(_needs_no_cap)
@in_attention
def kernel_of_prefill(call: AttentionCall) -> Tensor:
    """The query stands in four rows, of which the last one is taken."""
    keys, values = repeated(call)
    rows = torch.cat([call.query] * 4, dim=2)
    mask = additive(call, call.query.dtype)
    mask = None if mask is None else torch.cat([mask] * 4, dim=2)
    out = F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, scale=call.scale)
    return out[:, :, -call.query.shape[2] :].transpose(1, 2).contiguous()


# ------------------------------------------------------------------------------------------------------ splits


@twins({"two_splits": 2, "three_splits": 3}, needs_interface)
def equal_splits(n_splits: int) -> Way:
    return in_attention(lambda call: merged(call, split_in(call, n_splits)))


@twin(needs_interface)
@in_attention
def blocks_of_four(call: AttentionCall) -> Tensor:
    n_keys = call.key.shape[2]
    return merged(call, [(start, min(start + 4, n_keys)) for start in range(0, n_keys, 4)])


@twin(needs_interface)
@in_attention
def current_token_apart(call: AttentionCall) -> Tensor:
    n_keys = call.key.shape[2]
    return merged(call, [(0, n_keys - 1), (n_keys - 1, n_keys)] if n_keys > 1 else [(0, 1)])


# ------------------------------------------------------------------------------------------------------ operands


def _reorder(call: AttentionCall, order: list[int]) -> bool:
    call.key, call.value = call.key[:, :, order], call.value[:, :, order]
    call.mask = None if call.mask is None else call.mask[..., order]
    return True


@twin(needs_interface)
@in_attention
def slots_reversed(call: AttentionCall) -> Tensor:
    _reorder(call, list(reversed(range(call.key.shape[2]))))
    return merged(call, split_in(call, 2))


@twin(needs_interface)
@in_attention
def slots_permuted(call: AttentionCall) -> Tensor:
    n_keys = call.key.shape[2]
    _reorder(call, torch.randperm(n_keys, generator=torch.Generator().manual_seed(n_keys)).tolist())
    return merged(call, [(0, n_keys)])


@twin(needs_interface)
@in_attention
def slots_permuted_for_the_kernel(call: AttentionCall) -> bool:
    return _reorder(call, list(reversed(range(call.key.shape[2]))))


@twin(needs_interface)
@in_attention
def query_doubled_scale_halved(call: AttentionCall) -> bool:
    call.query, call.scale = call.query * 2.0, call.scale / 2.0
    return True


@twin(needs_interface)
@in_attention
def query_times_four_key_quartered(call: AttentionCall) -> bool:
    call.query, call.key = call.query * 4.0, call.key / 4.0
    return True


@twin(needs_interface)
@in_attention
def values_doubled_output_halved(call: AttentionCall) -> Tensor:
    return context(call, softmax_of(call, scores_of(call)), repeated(call)[1] * 2.0) / 2.0


@twin(needs_interface)
@in_attention
def scores_shifted(call: AttentionCall) -> Tensor:
    scores = with_sink(call, scores_of(call)) + 3.0
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return context(call, (weights / weights.sum(-1, keepdim=True))[..., : call.key.shape[2]])


def _alibi_modules(model: Any) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__.endswith("Attention")]


@twin(needs_alibi)
@in_argument(_alibi_modules, "alibi")
def alibi_shifted(alibi: Tensor) -> Tensor:
    return alibi - alibi[..., -1:]


# ------------------------------------------------------------------------------------------------------ layouts


@twin(needs_groups)
@in_attention
def kv_heads_repeated(call: AttentionCall) -> Tensor:
    """Repeated keys instead of an expanded view."""
    group = call.query.shape[1] // call.key.shape[1]
    call.key = call.key.repeat_interleave(group, dim=1)
    call.value = call.value.repeat_interleave(group, dim=1)
    return attend(call)


@twin(needs_interface)
@in_attention
def contiguous_copies(call: AttentionCall) -> bool:
    call.query, call.key, call.value = (t.clone().contiguous() for t in (call.query, call.key, call.value))
    return True


@twin(needs_interface)
@in_attention
def strided_views(call: AttentionCall) -> bool:
    call.query, call.key, call.value = (
        t.transpose(1, 2).contiguous().transpose(1, 2) for t in (call.query, call.key, call.value)
    )
    return True


@twin(needs_interface)
@in_attention
def rows_in_a_larger_buffer(call: AttentionCall) -> bool:
    """As rows of a static cache lie in one."""
    for name in ("key", "value"):
        rows = getattr(call, name)
        buffer = torch.full((*rows.shape[:2], 64 + rows.shape[2], rows.shape[3]), 7.0).to(rows.device, rows.dtype)
        buffer[:, :, 5 : 5 + rows.shape[2]] = rows
        setattr(call, name, buffer[:, :, 5 : 5 + rows.shape[2]])
    return True


def _pad(call: AttentionCall, content: Callable[[Tensor], Tensor]) -> bool:
    """Up to three more slots behind the last key, hidden by the mask."""
    mask = additive(call, call.query.dtype)
    if mask is None:
        mask = torch.zeros(1, 1, call.query.shape[2], call.key.shape[2], dtype=call.query.dtype)
    n_more = min(3, call.key.shape[2])
    hidden = torch.full((*mask.shape[:-1], n_more), torch.finfo(mask.dtype).min, dtype=mask.dtype)
    call.mask = torch.cat([mask.to(call.query.device), hidden.to(call.query.device)], dim=-1)
    call.key = torch.cat([call.key, content(call.key[:, :, :n_more])], dim=2)
    call.value = torch.cat([call.value, content(call.value[:, :, :n_more])], dim=2)
    return True


@twin(_needs_no_cap)
@in_attention
def padding_of_zeros(call: AttentionCall) -> bool:
    return _pad(call, torch.zeros_like)


@twin(_needs_no_cap)
@in_attention
def padding_of_garbage(call: AttentionCall) -> bool:
    return _pad(call, lambda rows: rows.flip(1) * 3.0 + 1.0)
