"""Attention as engines of their own write it: what it reads is found, and nothing else is taken for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.attended import OperandPair
from kvdrift.engines.torch.scored import scored_by
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import (
    DIM,
    HEADS,
    KV_HEADS,
    PROMPTS,
    SCALE,
    WIDTH,
    Decoder,
    Hold,
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
Core = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]


def _grouped_einsum(is_faulty: bool) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        grouped = torch.unflatten(query, 1, (KV_HEADS, GROUP))
        scores = torch.einsum("bghtd,bgsd->bghts", grouped, keys) * SCALE
        probs = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        return torch.einsum("bghts,bgsd->bghtd", probs, values).flatten(1, 2)

    return core


def _tokens_before_heads(is_faulty: bool) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        grouped = torch.unflatten(query.transpose(1, 2), 2, (KV_HEADS, GROUP))
        scores = torch.einsum("BTKGH,BSKH->BTKGS", grouped * SCALE, keys.transpose(1, 2))
        seen = causal(query, keys, start)[None, :, None, None]
        probs = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1)
        return torch.einsum("BTKGS,BSKH->BTKGH", probs, values.transpose(1, 2)).flatten(2, 3).transpose(1, 2)

    return core


def _heads_among_tokens(is_faulty: bool) -> Core:
    """One product for each kv head, whose rows are all tokens of one query head after those of another."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        tokens = query.shape[2]
        scores = torch.bmm(query[0].reshape(KV_HEADS, GROUP * tokens, DIM), keys[0].mT) * SCALE
        probs = scores.masked_fill(~causal(query, keys, start).repeat(GROUP, 1), -torch.inf).softmax(-1)
        return torch.bmm(probs, values[0]).reshape(1, HEADS, tokens, DIM)

    return core


def _tokens_among_heads(is_faulty: bool) -> Core:
    """The same, whose rows are all heads of one token after those of another."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        tokens = query.shape[2]
        packed = torch.unflatten(query[0], 0, (KV_HEADS, GROUP)).transpose(1, 2).reshape(KV_HEADS, tokens * GROUP, DIM)
        seen = causal(query, keys, start).repeat_interleave(GROUP, 0)
        probs = (torch.bmm(packed, keys[0].mT) * SCALE).masked_fill(~seen, -torch.inf).softmax(-1)
        context = torch.bmm(probs, values[0]).reshape(KV_HEADS, tokens, GROUP, DIM)
        return context.transpose(1, 2).reshape(1, HEADS, tokens, DIM)

    return core


def _added_to(is_faulty: bool) -> Core:
    """Scores that are added to a bias in one call, as BLOOM makes them."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        bias = 0.1 * torch.arange(keys.shape[2]).to(query).expand(HEADS, query.shape[2], -1)
        scores = torch.baddbmm(bias, query[0], by_query_head(keys)[0].mT, beta=1.0, alpha=SCALE)
        probs = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        return torch.bmm(probs, by_query_head(values)[0])[None]

    return core


LAYOUTS = [_grouped_einsum, _tokens_before_heads, _heads_among_tokens, _tokens_among_heads, _added_to]


@pytest.mark.parametrize("written", LAYOUTS)
def test_a_slot_is_named_however_the_products_of_attention_are_laid_out(written: Callable[[bool], Core]) -> None:
    clean, faulty = (audited(written(is_faulty)) for is_faulty in (False, True))

    assert clean.verdict in PASSES
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "v_cache"))
    assert "slot 0" in faulty.view["hypotheses"]["conclusion"]


def _two_maps(is_view: bool, share: float = 0.4, *, is_positive: bool = False) -> Core:
    """One map of attention less a part of another, each of half of the dimensions; in decode the part is `share`."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        query = query.relu() if is_positive else query
        maps = []
        for half in (slice(0, DIM // 2), slice(DIM // 2, DIM)):
            part = query[..., half] if is_view else query[..., half] * 1.0
            scores = part @ by_query_head(keys)[..., half].mT * SCALE
            maps.append(scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1))
        return torch.matmul(maps[0] - (share if decoding else 0.4) * maps[1], by_query_head(values))

    return core


@pytest.mark.parametrize("n_tokens", [DIM // 2 - 1, DIM // 2, DIM // 2 + 3])
@pytest.mark.parametrize("is_view", [True, False])
def test_a_second_map_of_attention_is_not_taken_for_values(is_view: bool, n_tokens: int) -> None:
    """With as many keys as half of a head has dimensions its product has the shape of one with values."""
    prompts = {"x": PROMPTS["q"][:n_tokens]}
    clean, faulty = (
        kvdrift.audit(engine(Decoder([Layer(n, _two_maps(is_view, share)) for n in range(2)])), prompts=prompts, span=2)
        for share in (0.4, 0.42)
    )

    assert clean.verdict in PASSES, clean.first_failure
    assert not [item for item in clean.view["caveats"] if item["code"] == "TRACE_OFFSET"]
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (0, "attn_ctx"))


def test_a_view_of_a_query_without_numbers_below_zero_is_not_taken_for_weights() -> None:
    maps = _two_maps(is_view=True, is_positive=True)
    audit = kvdrift.audit(
        engine(Decoder([Layer(n, maps) for n in range(2)])), prompts={"x": PROMPTS["q"][: DIM // 2 - 1]}, span=2
    )

    # A fault that is planted in a query makes another tensor of it, which is no view any more.
    unpaired = audit.suite.judged.measured.table.unpaired
    assert audit.verdict in PASSES, audit.first_failure
    assert not [value for mode, _, value in unpaired if not mode.startswith("control")]


def test_weights_with_a_scale_for_each_key_take_values_at_every_length() -> None:
    """With as many keys as a head has dimensions, weights have the shape of a query."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = query @ by_query_head(keys).mT * SCALE
        probs = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        scales = values.abs().amax(-1)
        return torch.matmul(probs * by_query_head(scales)[:, :, None], by_query_head(values / scales[..., None]))

    audit = kvdrift.audit(
        engine(Decoder([Layer(n, core) for n in range(2)])), prompts={"x": PROMPTS["q"][: DIM - 1]}, span=2
    )

    assert audit.verdict in PASSES
    assert not [item for item in audit.view["caveats"] if item["code"] == "TRACE_OFFSET"]


def _in_blocks(wrong_weights: bool) -> Core:
    """Decode attends to blocks of four keys, and merges them by their log-sums, as a paged kernel does."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        parts, sums = [], []
        for first in range(0, keys.shape[2], 4):
            block = slice(first, first + 4)
            scores = query @ by_query_head(keys)[:, :, block].mT * SCALE
            sums.append(torch.logsumexp(scores, -1, keepdim=True))
            parts.append(torch.softmax(scores, -1) @ by_query_head(values)[:, :, block])
        weights = torch.softmax(torch.cat(sums, -1), -1)
        weights = torch.full_like(weights, 1.0 / weights.shape[-1]) if wrong_weights else weights
        return sum((weights[..., i : i + 1] * part for i, part in enumerate(parts)), torch.zeros_like(query))

    return core


def test_attention_in_blocks_reads_all_their_keys() -> None:
    clean, faulty = audited(_in_blocks(False)), audited(_in_blocks(True))

    assert clean.verdict in PASSES
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_ctx"))


@pytest.mark.parametrize("apart", [1, 3])
def test_keys_that_a_cache_keeps_apart_are_read_beside_the_others(apart: int) -> None:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        keys, values = by_query_head(keys), by_query_head(values)
        scores = torch.cat([query @ keys[:, :, :-apart].mT, query @ keys[:, :, -apart:].mT], -1) * SCALE
        probs = scores.softmax(-1)
        old, new = probs[..., :-apart] @ values[:, :, :-apart], probs[..., -apart:] @ values[:, :, -apart:]
        return torch.add(old, new)

    assert audited(core).verdict in PASSES


def test_scores_that_are_a_mixture_of_two_products_are_taken_for_none_of_them() -> None:
    """Of keys with and without their rounding, say."""
    draw = torch.Generator().manual_seed(1)
    query, keys = (torch.randn(1, 2, n, DIM, generator=draw) for n in (3, 7))
    pairs = [OperandPair(query, keys), OperandPair(query, torch.round(keys))]
    products = [query @ pair.right.mT for pair in pairs]

    assert scored_by(pairs, torch.where(torch.arange(7) < 4, products[0], products[1])) is None
    found = scored_by(pairs, products[1])
    assert found is not None
    assert found.pair is pairs[1]


def _gated(is_faulty: bool) -> Callable[[Tensor, Tensor, bool], Tensor]:
    return lambda context, x, decoding: context * (1.0 if is_faulty and decoding else torch.sigmoid(x))


def test_a_gate_behind_attention_is_not_taken_for_attention() -> None:
    clean, faulty = (audited(plain, behind=_gated(is_faulty)) for is_faulty in (False, True))

    assert clean.verdict in PASSES
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_out"))


def _with_sinks(is_faulty: bool) -> Core:
    """Sinks that scale what attention gives by the logistic function of its log-sum, in float32."""
    sinks = torch.tensor([0.5, -0.5, 1.0, 0.0])[:, None, None]

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = (query @ by_query_head(keys).mT * SCALE).float()
        scores = scores.masked_fill(~causal(query, keys, start), -torch.inf)
        total = torch.logsumexp(scores[..., int(is_faulty and decoding) :], -1, keepdim=True)
        context = scores.softmax(-1).to(query.dtype) @ by_query_head(values)
        return torch.mul(context.float(), torch.sigmoid(total - sinks)).to(query.dtype)

    return core


def test_sinks_behind_the_softmax_are_not_taken_for_attention() -> None:
    clean, faulty = audited(_with_sinks(False)), audited(_with_sinks(True))

    assert clean.verdict in PASSES, clean.decision.reasons
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_out"))


def test_heads_that_are_mixed_behind_the_softmax_are_not_called_wrong() -> None:
    mix = 0.25 * torch.ones(HEADS, HEADS) + torch.eye(HEADS)

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = query @ by_query_head(keys).mT * SCALE
        probs = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        return torch.einsum("bhts,hg->bgts", probs, mix.to(probs)) @ by_query_head(values)

    assert audited(core).verdict in PASSES


def _by_hand(query: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
    """Attention in which no call of torch is one of attention."""
    scores = (query[..., None, :] * by_query_head(keys)[:, :, None]).sum(-1) * SCALE
    weights = torch.exp(scores.masked_fill(~causal(query, keys, start), -torch.inf))
    return ((weights / weights.sum(-1, keepdim=True))[..., None] * by_query_head(values)[:, :, None]).sum(-2)


def _unseen(is_faulty: bool) -> Core:
    """Prefill rounds on the way, and decode does not."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        values = without_second_key(values, is_faulty and decoding)
        if not decoding or query.dtype == torch.float64:
            return _by_hand(query, keys, values, start)
        return _by_hand(query.float(), keys.float(), values.float(), start).to(query.dtype)

    return core


def test_attention_that_is_not_seen_may_round_in_another_way() -> None:
    clean, faulty = (audited(_unseen(is_faulty), torch.bfloat16, at=0) for is_faulty in (False, True))

    assert clean.verdict in PASSES
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (0, "attn_ctx"))


class Half(Layer):
    """A layer whose attention is no module, and whose feed-forward part is one."""

    def __init__(self, number: int, core: Core) -> None:
        super().__init__(number, core)
        del self.attention
        self.number, self.core = number, core
        self.qkv = nn.Parameter(torch.zeros((HEADS + 2 * KV_HEADS) * DIM, WIDTH))
        self.out = nn.Parameter(torch.zeros(WIDTH, HEADS * DIM))

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        projected = torch.unflatten(F.linear(self.norm(x), self.qkv), -1, (-1, DIM)).transpose(1, 2)
        query, key, value = torch.split(projected, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        rows = cache[self.number]
        if rows is not None:
            key, value = torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)
        cache[self.number] = key, value
        context = self.core(query, key, value, start, x.shape[1] == 1 and start > 0)
        x = x + F.linear(context.transpose(1, 2).flatten(2), self.out)
        return torch.add(x, self.mlp(self.mlp_norm(x)))


def test_what_lies_between_recorded_sites_rounds_as_well() -> None:
    named = {"layers.{i}.mlp_norm": "resid_attn"}
    clean, faulty = (
        kvdrift.audit(
            engine(Decoder([Half(n, _unseen(is_faulty)) for n in range(2)]), torch.bfloat16, sites=named),
            prompts=PROMPTS,
            span=2,
        )
        for is_faulty in (False, True)
    )

    assert clean.verdict in PASSES, clean.first_failure
    assert faulty.verdict is Verdict.MISMATCH


class Whole(nn.Module):
    """A layer without modules for its parts."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.qkv = nn.Parameter(torch.zeros((HEADS + 2 * KV_HEADS) * DIM, WIDTH))
        self.out, self.mlp = nn.Parameter(torch.zeros(WIDTH, HEADS * DIM)), nn.Parameter(torch.zeros(WIDTH, WIDTH))

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        projected = torch.unflatten(F.linear(F.rms_norm(x, (WIDTH,)), self.qkv), -1, (-1, DIM)).transpose(1, 2)
        query, key, value = torch.split(projected, [HEADS, KV_HEADS, KV_HEADS], dim=1)
        rows = cache[self.number]
        if rows is not None:
            key, value = torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)
        cache[self.number] = key, value
        value = without_second_key(value, self.number == 1 and x.shape[1] == 1)
        x = x + F.linear(plain(query, key, value, start, x.shape[1] == 1).transpose(1, 2).flatten(2), self.out)
        return x + F.silu(F.linear(F.rms_norm(x, (WIDTH,)), self.mlp))


def test_attention_of_a_layer_without_modules_is_seen() -> None:
    audit = kvdrift.audit(engine(Decoder([Whole(0), Whole(1)])), prompts=PROMPTS, span=2)

    assert (audit.verdict, first_of(audit)) == (Verdict.MISMATCH, (1, "v_cache"))


def _in_a_dictionary(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    model.blocks = nn.ModuleDict({f"h{number}": layer for number, layer in enumerate(layers)})


def _numbered(model: nn.Module, layers: Sequence[nn.Module]) -> None:
    for number, layer in enumerate(layers):
        setattr(model, f"layer_{number}", layer)


@pytest.mark.parametrize("hold", [_in_a_dictionary, _numbered])
def test_layers_need_not_be_in_a_list(hold: Hold) -> None:
    layers = [Layer(0), Layer(1, _grouped_einsum(True))]
    audit = kvdrift.audit(engine(Decoder(layers, hold)), prompts=PROMPTS, span=2)

    assert (audit.verdict, first_of(audit)) == (Verdict.MISMATCH, (1, "v_cache"))


def _wide_scores(is_narrow: bool, factor: float = 1.0) -> Core:
    """Attention whose scores are held in float32, as a product of 16 bits or of float32 makes them."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        products = query @ by_query_head(keys).mT if is_narrow else query.float() @ by_query_head(keys).float().mT
        scores = (products * SCALE).float() * (factor if decoding else 1.0)
        weights: Tensor = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        return torch.matmul(weights.to(query.dtype), by_query_head(values))

    return core


@pytest.mark.parametrize("decode_is_narrow", [True, False])
@pytest.mark.parametrize("ladder", ["off", pytest.param("model", marks=pytest.mark.matrix)])
def test_scores_of_16_bits_in_one_pass_that_are_held_in_float32_are_rounding(
    decode_is_narrow: bool, ladder: str
) -> None:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        return _wide_scores(decode_is_narrow == decoding)(query, keys, values, start, decoding)

    def faulty(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        return _wide_scores(decode_is_narrow == decoding, 1.04)(query, keys, values, start, decoding)

    clean, off = (audited(each, torch.bfloat16, ladder=ladder) for each in (core, faulty))

    assert clean.verdict in PASSES, clean.first_failure
    assert (off.verdict, first_of(off)) == (Verdict.MISMATCH, (1, "attn_scores"))
