"""Decode steps that lay out what they compute otherwise than prefill: heads, ranks, rows of a batch, wider streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import (
    DIM,
    HEADS,
    KV_HEADS,
    PROMPTS,
    SCALE,
    WIDTH,
    Attention,
    Core,
    Decoder,
    Layer,
    audited,
    by_query_head,
    causal,
    engine,
    first_of,
    plain,
    without_second_key,
)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
GROUP = HEADS // KV_HEADS
Ladder = Literal["model", "off"]


def _packed_kernel(is_faulty: bool, tokens_first: bool = False, is_flat: bool = False) -> Core:
    """The query heads of a kv head are rows of one call of torch's kernel, in both passes."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        tokens = query.shape[2]
        mask = causal(query, keys, start)
        grouped = torch.unflatten(query[0], 0, (KV_HEADS, GROUP))
        if tokens_first:
            packed, mask = grouped.transpose(1, 2).flatten(1, 2), mask.repeat_interleave(GROUP, 0)
        else:
            packed, mask = grouped.flatten(1, 2), mask.repeat(GROUP, 1)
        given = (packed, keys[0], values[0]) if is_flat else (packed[None], keys, values)
        out = F.scaled_dot_product_attention(*given, attn_mask=mask)
        out = torch.unflatten(out if is_flat else out[0], 1, (tokens, GROUP) if tokens_first else (GROUP, tokens))
        return (out.transpose(1, 2) if tokens_first else out).reshape(1, HEADS, tokens, DIM)

    return core


def _tokens_first(is_faulty: bool) -> Core:
    return _packed_kernel(is_faulty, tokens_first=True)


def _without_rows(is_faulty: bool) -> Core:
    return _packed_kernel(is_faulty, is_flat=True)


def _keys_times_queries(is_faulty: bool) -> Core:
    """Scores stand as [key, head], and values as [dim, key], in decode."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        values = without_second_key(values, is_faulty)
        scores = keys @ query.view(1, KV_HEADS, GROUP, DIM).mT * SCALE
        out = torch.matmul(values.mT.contiguous(), torch.softmax(scores, 2))
        return out.mT.reshape(1, HEADS, 1, DIM)

    return core


def _one_head_after_the_other(is_faulty: bool) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        values = without_second_key(values, is_faulty)
        made = []
        for head in range(KV_HEADS):
            own = query[0, head * GROUP : (head + 1) * GROUP, 0]
            made.append(torch.softmax(own @ keys[0, head].T * SCALE, -1) @ values[0, head])
        return torch.cat(made).reshape(1, HEADS, 1, DIM)

    return core


def _rank_by_rank(is_faulty: bool) -> Core:
    """Each rank attends with its heads."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        values = without_second_key(values, is_faulty)
        ranks = zip(query.chunk(KV_HEADS, 1), keys.chunk(KV_HEADS, 1), values.chunk(KV_HEADS, 1), strict=True)
        return torch.cat([F.scaled_dot_product_attention(*given, enable_gqa=True) for given in ranks], 1)

    return core


LAYOUTS = [
    _packed_kernel,
    _tokens_first,
    _without_rows,
    _keys_times_queries,
    _one_head_after_the_other,
    _rank_by_rank,
]


@pytest.mark.parametrize("written", LAYOUTS)
@pytest.mark.parametrize(("dtype", "ladder"), [(torch.float32, "model"), (torch.bfloat16, "off")])
def test_a_slot_is_named_however_heads_are_laid_out(
    written: Callable[[bool], Core], dtype: torch.dtype, ladder: Ladder
) -> None:
    clean, faulty = (audited(written(is_faulty), dtype, ladder=ladder) for is_faulty in (False, True))

    assert clean.verdict in PASSES, clean.decision.reasons
    assert not [item for item in clean.view["caveats"] if item["code"] in ("TRACE_OFFSET", "OTHER_FORM")]
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "v_cache"))


def _wide_scores(scale: float) -> Core:
    """Scores of 16 bits to which a mask of float64 is added, over all slots of a cache; in decode."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        keys, values = (F.pad(by_query_head(rows), (0, 0, 0, 3), value=0.5) for rows in (keys, values))
        mask = torch.zeros(1, keys.shape[2], dtype=torch.float64)
        mask[:, -3:] = -1e9
        scores = (query @ keys.mT * scale).double() + mask
        return scores.softmax(-1).to(query.dtype) @ values

    return core


@pytest.mark.parametrize("ladder", ["model", "off"])
def test_scores_of_16_bits_may_meet_a_mask_of_float64(ladder: Ladder) -> None:
    clean, faulty = (audited(_wide_scores(by * SCALE), torch.bfloat16, ladder=ladder) for by in (1.0, 1.04))

    assert clean.verdict in PASSES, (clean.first_failure, clean.decision.reasons)
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_scores"))


class _Ranks(Attention):
    """The output projection is two partial products in decode, and their sum; one of them is times `share`."""

    share = 1.0

    def project(self, context: Tensor, decoding: bool) -> Tensor:
        if not decoding:
            return super().project(context, decoding)
        halves = zip(context.chunk(2, -1), self.o_proj.weight.chunk(2, 1), strict=True)
        first, second = (F.linear(row, weight) for row, weight in halves)
        return first + second * (self.share if self.number == 1 else 1.0)


class _RankLost(_Ranks):
    share = 0.0


class _RankTooLarge(_Ranks):
    share = 1.05


def _of_ranks(kind: type[Attention]) -> Decoder:
    layers = [Layer(n) for n in range(2)]
    for layer in layers:
        layer.attention = kind(layer.attention.number)
    return Decoder(layers)


@pytest.mark.parametrize(("dtype", "ladder"), [(torch.float32, "model"), (torch.bfloat16, "off")])
def test_partial_products_of_two_ranks_are_an_output_projection(dtype: torch.dtype, ladder: Ladder) -> None:
    clean, lost, large = (
        kvdrift.audit(engine(_of_ranks(kind), dtype), prompts=PROMPTS, span=2, ladder=ladder)
        for kind in (_Ranks, _RankLost, _RankTooLarge)
    )

    assert clean.verdict in PASSES, clean.decision.reasons
    assert (lost.verdict, first_of(lost)) == (Verdict.MISMATCH, (1, "attn_out"))
    assert (large.verdict, first_of(large)) == (Verdict.MISMATCH, (1, "attn_out"))


class _WideLayer(Layer):
    """Adds to a stream of any dtype; in decode its attention counts `share` times."""

    share = 1.0

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        native = self.norm.weight.dtype
        out = self.attention(self.norm(x.to(native)), cache, start)
        share = self.share if x.shape[1] == 1 and self.attention.number == 1 else 1.0
        x = x + out.to(x.dtype) * share
        return torch.add(x, self.mlp(self.mlp_norm(x.to(native))).to(x.dtype))


class _TooMuchAttention(_WideLayer):
    share = 1.05


class _WideStream(Decoder):
    """Keeps its residual stream in float32 in decode."""

    def forward(self, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(start, start + ids.shape[1]))
        native = x.dtype
        if ids.shape[1] == 1 and native.itemsize < 4:
            x = x.float()
        for layer in self._order:
            x = layer(x, cache, start)
        logits: Tensor = self.head(self.norm(x.to(native)))
        return logits


@pytest.mark.parametrize("ladder", ["model", "off"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_stream_that_decode_keeps_wider_is_compared_at_the_dtype_of_the_model(
    dtype: torch.dtype, ladder: Ladder
) -> None:
    clean, faulty = (
        kvdrift.audit(engine(_WideStream([kind(n) for n in range(2)]), dtype), prompts=PROMPTS, span=2, ladder=ladder)
        for kind in (_WideLayer, _TooMuchAttention)
    )

    assert clean.verdict in PASSES, clean.decision.reasons
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "resid_attn"))


class _NarrowStream(_WideStream):
    """Keeps it in bfloat16 in decode, in a model of float32."""

    def forward(self, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(start, start + ids.shape[1]))
        native = x.dtype
        if ids.shape[1] == 1 and native == torch.float32:
            x = x.bfloat16()
        for layer in self._order:
            x = layer(x, cache, start)
        logits: Tensor = self.head(self.norm(x.to(native)))
        return logits


def test_a_stream_that_decode_keeps_narrower_than_the_model_does_not_pass() -> None:
    audit = kvdrift.audit(engine(_NarrowStream([_WideLayer(n) for n in range(2)])), prompts=PROMPTS, span=2)

    assert audit.verdict not in PASSES


class _Batched(Attention):
    """Whose output of a row holds a `leak` of the next one in decode."""

    leak = 0.0

    def project(self, context: Tensor, decoding: bool) -> Tensor:
        out = super().project(context, decoding)
        return out + self.leak * out.roll(-1, 0) if self.number == 1 and decoding else out


class _Leaking(_Batched):
    leak = 0.05


def _batched(kind: type[Attention], dtype: torch.dtype, own: int, in_prefill: bool) -> kvdrift.TorchEngine:
    """An engine whose decode step, and prefill as well with `in_prefill`, has eight rows, of which one is its own."""
    model = _of_ranks(kind)

    def step(tokens: Tensor, cache: list[Any], start: int) -> Tensor:
        if start == 0 and not in_prefill:
            return torch.as_tensor(model(tokens, cache, start))
        if start and cache[0][0].shape[0] == 1:
            cache[:] = [tuple(_among(each, own) for each in rows) for rows in cache]
        batch = torch.full((8, tokens.shape[1]), 63)
        batch[own] = tokens[0]
        logits: Tensor = model(batch, cache, start)[own : own + 1]
        if start:
            cache[:] = [tuple(each[own : own + 1] for each in rows) for rows in cache]
        return logits

    made = engine(model, dtype)
    return kvdrift.TorchEngine(made.model, step=step, new_cache=made.new_cache, rewind=made.rewind)


def _among(rows: Tensor, own: int) -> Tensor:
    """The rows of a sequence among those of seven others."""
    draw = torch.Generator().manual_seed(3)
    others = torch.randn(8, *rows.shape[1:], generator=draw).to(rows)
    others[own] = rows[0]
    return others


@pytest.mark.parametrize("own", [0, 5])
@pytest.mark.parametrize(("dtype", "ladder"), [(torch.float32, "model"), (torch.bfloat16, "off")])
def test_rows_that_fill_up_a_batch_are_not_recorded(dtype: torch.dtype, ladder: Ladder, own: int) -> None:
    clean, faulty = (
        kvdrift.audit(_batched(kind, dtype, own, in_prefill=False), prompts=PROMPTS, span=2, ladder=ladder)
        for kind in (_Batched, _Leaking)
    )

    assert clean.verdict in PASSES, clean.decision.reasons
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_out"))


def test_roles_are_found_in_one_row_of_a_batch() -> None:
    audit = kvdrift.audit(_batched(_Batched, torch.float32, 5, in_prefill=True), prompts=PROMPTS, span=2)

    assert audit.verdict in PASSES, audit.decision.reasons
    assert WIDTH == HEADS * DIM  # so that all sites of attention were found
