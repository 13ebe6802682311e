"""Kernels: merging, heads, tiles, keys."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift_bench.planted.torch import own
from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention
from tests.support.untuned.register import fault


def _thirds(call: AttentionCall) -> list[tuple[Tensor, Tensor, Tensor]]:
    n = call.key.shape[2]
    cuts = [0, n // 3, 2 * n // 3, n]
    return [own.split_of(call, a, b) for a, b in pairwise(cuts)]


def _merge(call: AttentionCall, parts: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    peak = torch.stack([part[2] for part in parts]).amax(0)
    weights = [torch.exp(part[2] - peak) for part in parts]
    out = torch.stack([part[0] * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
    total = torch.stack([part[1] * weight for part, weight in zip(parts, weights, strict=True)]).sum(0)
    return own.handed(call, out / total)


@fault("split_lost", "key_tile_lost", "key_lost_middle")
@in_attention
def split_never_merged(call: AttentionCall) -> Tensor:
    parts = _thirds(call)
    return _merge(call, [parts[0], parts[2]])


@fault("split_counted_twice")
@in_attention
def split_merged_twice(call: AttentionCall) -> Tensor:
    parts = _thirds(call)
    return _merge(call, [*parts, parts[1]])


@fault("split_lost", "chunk_merge")
@in_attention
def split_lost_from_the_numerator(call: AttentionCall) -> Tensor:
    parts = _thirds(call)
    return _merge(call, [parts[0], (0.0 * parts[1][0], *parts[1][1:]), parts[2]])


@fault("chunk_merge", "unexplained")
@in_attention
def accumulator_not_rescaled(call: AttentionCall) -> Tensor:
    """An online softmax that rescales its sum when the largest score grows, and forgets its accumulator."""
    parts = _thirds(call)
    peak = torch.stack([part[2] for part in parts]).amax(0)
    total = torch.stack([part[1] * torch.exp(part[2] - peak) for part in parts]).sum(0)
    running, out = parts[0][2], parts[0][0]
    for part in parts[1:]:
        running = torch.maximum(running, part[2])
        out = out + part[0] * torch.exp(part[2] - running)
    return own.handed(call, out / total)


def _probs(call: AttentionCall) -> Tensor:
    """Probabilities by `exp`, so that no softmax is seen from outside."""
    scores = own.scores_of(call)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    return weights / weights.sum(-1, keepdim=True)


def _context(call: AttentionCall) -> Tensor:
    return own.context(call, _probs(call)).clone()


@fault("heads_zero", "heads_scaled")
@in_attention
def last_head_of_each_group_not_computed(call: AttentionCall) -> Tensor:
    out = _context(call)
    out[:, :, 1::2] = 0.0
    return out


@fault("heads_scaled")
@in_attention
def one_head_scaled(call: AttentionCall) -> Tensor:
    out = _context(call)
    out[:, :, 2] *= 0.7071
    return out


@fault("tile_zero")
@in_attention
def last_tile_of_the_head_not_written(call: AttentionCall) -> Tensor:
    out = _context(call)
    out[..., -4:] = 0.0
    return out


@fault("unexplained")
@in_attention
def last_tile_of_the_head_wraps(call: AttentionCall) -> Tensor:
    out = _context(call)
    out[..., -4:] = out[..., :4]
    return out


@fault("blocks_permuted", "v_transposed", "context_heads_permuted")
@in_attention
def halves_of_the_values_exchanged(call: AttentionCall) -> Tensor:
    value = own.repeated(call)[1]
    return own.context(
        call, _probs(call), torch.cat([value[..., value.shape[-1] // 2 :], value[..., : value.shape[-1] // 2]], -1)
    )


@fault("head_group_wrong", "heads_tiled")
@in_attention
def values_of_the_last_group_for_all(call: AttentionCall) -> Tensor:
    order = [call.value.shape[1] - 1] * call.query.shape[1]
    return own.context(call, _probs(call), call.value[:, order])


@fault("heads_tiled", "head_group_wrong")
@in_attention
def values_mapped_by_tile(call: AttentionCall) -> Tensor:
    order = [head % call.value.shape[1] for head in range(call.query.shape[1])]
    return own.context(call, _probs(call), call.value[:, order])


@fault("softcap_wrong", "softcap_missing", "score_scale", of="gemma2")
@in_attention
def cap_before_scale(call: AttentionCall) -> Tensor:
    keys, values = own.repeated(call)
    cap = call.options["softcap"]
    raw = torch.matmul(wide(call.query), wide(keys).transpose(2, 3))
    scores = cap * torch.tanh(raw / cap) * call.scale
    mask = own.additive(call, scores.dtype)
    return own.context(call, own.softmax_of(call, scores if mask is None else scores + mask), values)


@fault("sink_missing", "sink_doubled", "sink_wrong", of="gpt_oss")
@in_attention
def sink_of_the_next_head(call: AttentionCall) -> Tensor:
    scores = own.scores_of(call)
    sink = own.sink_of(call)
    assert sink is not None
    column = sink.roll(1, dims=1).expand(*scores.shape[:3], 1)
    probs = F.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    return own.context(call, probs)


def _kept(call: AttentionCall, keep: list[int]) -> bool:
    call.key, call.value = call.key[:, :, keep], call.value[:, :, keep]
    call.mask = None if call.mask is None else call.mask[..., keep]
    return True


@fault("key_tile_lost", "kv_len_frozen")
@in_attention
def length_rounded_down_to_a_tile(call: AttentionCall) -> bool:
    return _kept(call, list(range(call.key.shape[2] // 4 * 4 or 1)))


@fault("key_lost_middle")
@in_attention
def length_before_the_token_one_short(call: AttentionCall) -> bool:
    n = call.key.shape[2]
    return _kept(call, [i for i in range(n) if i != n - 2])


@fault("key_lost_middle", "key_lost_first")
@in_attention
def even_keys_alone(call: AttentionCall) -> bool:
    n = call.key.shape[2]
    return _kept(call, [i for i in range(n) if i % 2 == (n - 1) % 2])


@fault("score_bias")
@in_attention
def first_key_attenuated(call: AttentionCall) -> Tensor:
    scores = own.scores_of(call).clone()
    scores[..., 0] -= 2.0
    return own.context(call, own.softmax_of(call, scores))


@fault("score_scale")
@in_attention
def softmax_of_base_two(call: AttentionCall) -> Tensor:
    weights = torch.exp2(own.scores_of(call) - own.scores_of(call).amax(-1, keepdim=True))
    return own.context(call, weights / weights.sum(-1, keepdim=True))
