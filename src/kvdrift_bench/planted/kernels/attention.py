"""Attention computed by other means: tiles, splits, pages, other layouts; compiled by C++, numba and TorchInductor."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.kernels import by_numba
from kvdrift_bench.planted.kernels.below import Shape, dense, needs_compiler, run, unseen
from kvdrift_bench.planted.kernels.registry import kernel, kernels
from kvdrift_bench.planted.torch.own import additive, handed, repeated, scores_of, split_in, split_of
from kvdrift_bench.planted.torch.parts import needs_interface, needs_sinks, wide
from kvdrift_bench.planted.torch.ways import AttentionCall, Way, in_attention

Attention = Callable[[AttentionCall], Tensor]

_LEAST = torch.finfo(torch.float32).min
_TILE = 8  # keys in a tile, so that prompts of a dozen tokens have several of them
_PAGE = 4  # slots in a page
_CHUNK = 8  # rows of a prefill that are computed at a time


def plain_scores(model: nn.Module) -> str | None:
    """Plain scores: no cap, no sinks, an attention function that is looked up."""
    if getattr(model.config, "attn_logit_softcapping", None) or needs_sinks(model) is None:
        return "scores are capped, or there are sinks"
    return needs_interface(model)


def scores_in_cpp(model: nn.Module) -> str | None:
    """Plain scores, and a C++ compiler."""
    return plain_scores(model) or needs_compiler(model)


def scores_in_numba(model: nn.Module) -> str | None:
    """Plain scores, and numba."""
    return plain_scores(model) or needs_numba(model)


def needs_numba(model: nn.Module) -> str | None:
    """numba."""
    return None if find_spec("numba") else "numba is not installed"


# ------------------------------------------------------------------------------------------------- compiled by C++


def shape_of(call: AttentionCall) -> Shape:
    """Return the numbers that a kernel wants to know."""
    (_, heads, rows, dim), (_, kv_heads, keys, _) = call.query.shape, call.key.shape
    return Shape(heads, kv_heads, rows, keys, dim, call.value.shape[3], call.scale)


def hidden_in(call: AttentionCall) -> Tensor | None:
    """Return the mask as numbers to add, dense in float32 [token, key], finite; None where every key is seen."""
    mask = additive(call, torch.float32)
    if mask is None:
        return None
    return dense(mask.clamp(min=_LEAST).expand(1, 1, call.query.shape[2], call.key.shape[2])[0, 0])


def in_cpp(name: str, *options: Any, defect: str = "") -> Attention:
    """Return attention by a kernel of below.cpp that works on float32, whatever the dtype of the model is."""

    def attention(call: AttentionCall) -> Tensor:
        with unseen():
            out = torch.empty(*call.query.shape[:3], call.value.shape[3])
            operands = (dense(call.query), dense(call.key), dense(call.value), hidden_in(call), out)
            run(name, *operands, shape_of(call), *options, defect=defect)
            return handed(call, out)

    return attention


@kernels(
    {
        "tiled_cpp": (_TILE, False, 0.0, False),
        "tiled_from_the_last_key_cpp": (_TILE, True, 0.0, False),
        "tiled_lazy_peak_cpp": (_TILE, False, 8.0, True),
        "tiled_exp2_cpp": (_TILE, False, 0.0, True),
    },
    scores_in_cpp,
)
def tiled(options: tuple[Any, ...]) -> Way:
    return in_attention(in_cpp("tiled_attention", *options))


@kernels({"split_k_exp_cpp": (3, 0), "split_k_log2_cpp": (3, 1), "split_k_softmax_cpp": (4, 2)}, scores_in_cpp)
def split(options: tuple[Any, ...]) -> Way:
    return in_attention(in_cpp("split_attention", *options))


def paged(defect: str = "") -> Attention:
    """Return attention over pages in an order of their own, among pages of other requests."""

    def attention(call: AttentionCall) -> Tensor:
        with unseen():
            n_kv, n_keys = call.key.shape[1:3]
            n_pages = -(-n_keys // _PAGE)
            table = torch.randperm(2 * n_pages, generator=torch.Generator().manual_seed(n_keys))[:n_pages]
            pools = []
            for rows in (call.key, call.value):
                pages = torch.full((n_pages * _PAGE, n_kv, rows.shape[3]), 7.0)
                pages[:n_keys] = dense(rows)[0].transpose(0, 1)
                pool = torch.full((2 * n_pages, _PAGE, n_kv, rows.shape[3]), 7.0)
                pool[table] = pages.view(n_pages, _PAGE, n_kv, -1)
                pools.append(pool)
            out = torch.empty(*call.query.shape[:3], call.value.shape[3])
            operands = (dense(call.query), *pools, table.to(torch.int32), hidden_in(call), out)
            run("paged_attention", *operands, shape_of(call), _PAGE, defect=defect)
            return handed(call, out)

    return attention


kernel(scores_in_cpp, name="pages_by_block_table_cpp")(in_attention(paged()))


def half_only(defect: str = "") -> Attention:
    """Return attention by a kernel that takes bfloat16 alone, behind the casts that an engine puts around it."""

    def attention(call: AttentionCall) -> Tensor:
        operands = [tensor.to(torch.bfloat16).contiguous() for tensor in (call.query, call.key, call.value)]
        with unseen():
            hidden = hidden_in(call)
        out = torch.empty(*call.query.shape[:3], call.value.shape[3], dtype=torch.bfloat16)
        run("half_attention", *operands, hidden, out, shape_of(call), defect=defect)
        return out.to(call.query.dtype).transpose(1, 2).contiguous()

    return attention


kernel(scores_in_cpp, name="bfloat16_only_cpp")(in_attention(half_only()))

# ------------------------------------------------------------------------------------------- numba and TorchInductor


def in_numba(*, odd: bool = False) -> Attention:
    """Return attention by plain loops in float32; with `odd` it is wrong for one head, see `by_numba.attend`."""

    def attention(call: AttentionCall) -> Tensor:
        with unseen():
            query, key, value = (dense(tensor)[0].numpy() for tensor in (call.query, call.key, call.value))
            hidden = hidden_in(call)
            if hidden is None:
                hidden = torch.zeros(call.query.shape[2], call.key.shape[2])
            out = torch.empty(*call.query.shape[1:3], call.value.shape[3])
            scale = out.numpy().dtype.type(call.scale)
            by_numba.compiled(by_numba.attend)(query, key, value, hidden.numpy(), scale, odd, out.numpy())
            return handed(call, out[None])

    return attention


kernel(scores_in_numba, name="attention_numba")(in_attention(in_numba()))


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = (query.float() @ key.float().transpose(2, 3)) * scale + mask
    return (scores.softmax(-1) @ value.float()).to(query.dtype).transpose(1, 2).contiguous()


@cache
def by_inductor(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function compiled by TorchInductor for tensors of any length; it is compiled when it is first called."""
    return torch.compile(function, dynamic=True)


def in_inductor(factor: float = 1.0) -> Attention:
    """Return attention compiled by TorchInductor, with `factor` at its scale."""

    def attention(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        mask = additive(call, torch.float32)
        if mask is None:
            mask = torch.zeros(1, 1, call.query.shape[2], call.key.shape[2])
        return by_inductor(_fused)(call.query, keys, values, mask, call.scale * factor)

    return attention


def scores_in_inductor(model: nn.Module) -> str | None:
    """Plain scores, and what TorchInductor compiles with."""
    return plain_scores(model) or needs_compiler(model)


kernel(scores_in_inductor, name="attention_inductor")(in_attention(in_inductor()))

# -------------------------------------------------------------------------------------------------- written in torch


@kernel(plain_scores)
@in_attention
def split_k_softmax_torch(call: AttentionCall) -> Tensor:
    """The weights of the parts come from a call of softmax that is not the one over the keys."""
    parts = [split_of(call, *bounds) for bounds in split_in(call, 3)]
    sums = torch.cat([peak + total.log() for _, total, peak in parts], dim=-1)
    weights = sums.softmax(-1)
    outs = [out / total * weights[..., i : i + 1] for i, (out, total, _) in enumerate(parts)]
    return handed(call, torch.stack(outs).sum(0))


@kernel(plain_scores)
@in_attention
def fixed_splits(call: AttentionCall) -> Tensor:
    """Splits of a fixed size, merged one after the other: the order of sums does not depend on the length."""
    total = peak = out = None
    for start in range(0, call.key.shape[2], _TILE):
        part, weight, top = split_of(call, start, min(start + _TILE, call.key.shape[2]))
        if out is None or total is None or peak is None:
            out, total, peak = part, weight, top
            continue
        new = torch.maximum(peak, top)
        old, now = torch.exp(peak - new), torch.exp(top - new)
        out, total, peak = out * old + part * now, total * old + weight * now, new
    assert out is not None
    assert total is not None
    return handed(call, out / total)


def _by_sdpa(call: AttentionCall, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    mask = additive(call, query.dtype)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=call.scale)


@kernels({"float16_only_sdpa": torch.float16, "bfloat16_only_sdpa": torch.bfloat16}, plain_scores)
def half_only_sdpa(dtype: torch.dtype) -> Way:
    def attention(call: AttentionCall) -> Tensor:
        operands = (tensor.to(dtype) for tensor in (call.query, *repeated(call)))
        return handed(call, _by_sdpa(call, *operands))

    return in_attention(attention)


@kernel(plain_scores)
@in_attention
def smoothed_keys(call: AttentionCall) -> bool:
    """The mean key is taken off each key: a constant for all scores of a row."""
    mean = wide(call.key).mean(2, keepdim=True)
    call.key = (wide(call.key) - mean).to(call.key.dtype)
    return True


@kernel(plain_scores)
@in_attention
def smoothed_keys_in_the_kernel(call: AttentionCall) -> Tensor:
    keys, values = repeated(call)
    smooth = wide(keys) - wide(keys).mean(2, keepdim=True)
    weights = torch.exp(F.log_softmax(scores_of(call, smooth), dim=-1))
    return handed(call, weights @ wide(values))


@kernel(plain_scores)
@in_attention
def probabilities_in_float32(call: AttentionCall) -> Tensor:
    keys, values = repeated(call)
    return handed(call, F.softmax(scores_of(call, keys), dim=-1) @ wide(values))


@kernel(plain_scores)
@in_attention
def weights_rounded_before_the_sum(call: AttentionCall) -> Tensor:
    """Weights are rounded to the native dtype for the product, and divided by their sum behind it."""
    keys, values = repeated(call)
    scores = scores_of(call, keys)
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    product = wide(weights.to(call.query.dtype)) @ wide(values)
    return handed(call, product / weights.sum(-1, keepdim=True))


@kernel(plain_scores)
@in_attention
def exp2_by_nine_digits(call: AttentionCall) -> Tensor:
    """Weights are powers of two, by a constant that is off by 6e-10."""
    keys, values = repeated(call)
    scores = scores_of(call, keys) * 1.44269504
    weights = torch.exp2(scores - scores.amax(-1, keepdim=True))
    return handed(call, weights @ wide(values) / weights.sum(-1, keepdim=True))


@kernel(plain_scores)
@in_attention
def query_prescaled(call: AttentionCall) -> bool:
    """The scale, and 1.1 to make it no power of two, are multiplied into the query, which is rounded once more."""
    call.query, call.scale = (wide(call.query) * (call.scale * 1.1)).to(call.query.dtype), 1.0 / 1.1
    return True


@kernel(plain_scores)
@in_attention
def cache_transposed(call: AttentionCall) -> Tensor:
    """Keys and values lie as [dim, key] in memory."""
    keys, values = (rows.transpose(2, 3).contiguous() for rows in repeated(call))
    scores = wide(call.query) @ wide(keys) * call.scale
    mask = additive(call, scores.dtype)
    weights = F.softmax(scores if mask is None else scores + mask, dim=-1).to(call.query.dtype)
    return handed(call, weights @ values.transpose(2, 3))


@kernel(plain_scores)
@in_attention
def ring_buffer(call: AttentionCall) -> Tensor:
    """Slots begin in the middle of the buffer and go round its end."""
    turn = call.key.shape[2] // 3
    mask = additive(call, call.query.dtype)
    call.key, call.value = call.key.roll(turn, 2), call.value.roll(turn, 2)
    if mask is not None:
        call.mask = mask.expand(1, 1, call.query.shape[2], call.key.shape[2]).roll(turn, -1)
    return handed(call, _by_sdpa(call, call.query, *repeated(call)))


@kernel(plain_scores)
@in_attention
def prefill_in_chunks(call: AttentionCall) -> Tensor:
    """Rows are computed a few at a time, each over the keys up to its last one."""
    mask = additive(call, call.query.dtype)
    keys, values = repeated(call)
    past, outs = call.key.shape[2] - call.query.shape[2], []
    for start in range(0, call.query.shape[2], _CHUNK):
        rows = call.query[:, :, start : start + _CHUNK]
        end = past + start + rows.shape[2]
        seen = None if mask is None else mask[..., start : start + _CHUNK, :end]
        outs.append(
            F.scaled_dot_product_attention(rows, keys[:, :, :end], values[:, :, :end], attn_mask=seen, scale=call.scale)
        )
    return handed(call, torch.cat(outs, dim=2))


@kernel(plain_scores)
@in_attention
def groups_by_einsum(call: AttentionCall) -> Tensor:
    """Heads of a group are an axis of their own; keys are neither repeated nor expanded."""
    _, heads, rows, dim = call.query.shape
    n_kv = call.key.shape[1]
    query = wide(call.query).reshape(n_kv, heads // n_kv, rows, dim)
    scores = torch.einsum("kgrd,ktd->kgrt", query, wide(call.key[0])) * call.scale
    mask = additive(call, scores.dtype)
    if mask is not None:
        scores = scores + mask[0]
    weights = torch.exp(scores - scores.amax(-1, keepdim=True))
    out = torch.einsum("kgrt,ktd->kgrd", weights / weights.sum(-1, keepdim=True), wide(call.value[0]))
    return handed(call, out.reshape(1, heads, rows, -1))


@kernel(plain_scores)
@in_attention
def heads_in_calls_of_their_own(call: AttentionCall) -> Tensor:
    operands = zip(*(torch.split(tensor, 1, dim=1) for tensor in (call.query, *repeated(call))), strict=True)
    return handed(call, torch.cat([_by_sdpa(call, *each) for each in operands], dim=1))


@kernel(plain_scores)
@in_attention
def heads_padded_with_zeros(call: AttentionCall) -> Tensor:
    """Dims of a head are filled up with zeros, to a size that a kernel takes."""
    dim = call.value.shape[3]
    operands = (F.pad(tensor, (0, 16)) for tensor in (call.query, *repeated(call)))
    return handed(call, _by_sdpa(call, *operands)[..., :dim])
