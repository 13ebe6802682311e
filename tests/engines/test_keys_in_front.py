"""Learned keys in front of those of the tokens, which every token sees: right ones pass, and a lost one is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.fused import keys_in_front
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further
from tests.support.own_decoder import DIM, KV_HEADS, SCALE, Core, audited, by_query_head, causal

N_LEARNED = 2


def learned(seed: int, dtype: torch.dtype) -> Tensor:
    rows = torch.randn(1, KV_HEADS, N_LEARNED, DIM, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows.to(dtype)


def with_learned(fault: str | None, *, by_kernel: bool) -> Core:
    """Attention to two learned keys and values in front of those of the tokens."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        seen = F.pad(causal(query, keys, start), (N_LEARNED, 0), value=True)
        keys = torch.cat([learned(1, keys.dtype), keys], dim=2)
        values = torch.cat([learned(2, values.dtype), values], dim=2)
        if decoding and fault == "first key":
            seen[:, 0] = False
        if decoding and fault == "last value":
            values = torch.cat([values[:, :, :1], torch.zeros_like(values[:, :, :1]), values[:, :, 2:]], dim=2)
        if decoding and fault == "newest key":
            seen[:, -1] = False
        if by_kernel:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)
        scores = (query @ by_query_head(keys).mT * SCALE).masked_fill(~seen, -torch.inf)
        return torch.matmul(scores.softmax(-1), by_query_head(values))

    return core


@pytest.mark.parametrize(
    ("by_kernel", "dtype"), [(True, torch.bfloat16), *further((False, torch.bfloat16), (True, torch.float32))]
)
def test_learned_keys_in_front_pass(by_kernel: bool, dtype: torch.dtype) -> None:
    audit = audited(with_learned(None, by_kernel=by_kernel), dtype)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
    assert "PREFILL_UNSTABLE" not in {caveat.code for caveat in audit.caveats}


@pytest.mark.parametrize(
    ("fault", "sites"),
    [
        ("first key", {Site.ATTN_PROBS}),
        ("last value", {Site.ATTN_CTX}),
        ("newest key", {Site.ATTN_SCORES}),
    ],
)
@pytest.mark.parametrize("by_kernel", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_one_of_them_that_decode_loses_is_found(fault: str, sites: set[Site], by_kernel: bool) -> None:
    audit = audited(with_learned(fault, by_kernel=by_kernel), torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 1
    assert audit.first_failure.site in sites


def test_a_cache_with_room_behind_its_tokens_has_none_in_front() -> None:
    made = torch.arange(2.0 * 5 * 3).reshape(1, 2, 5, 3)
    room = torch.zeros(1, 2, 4, 3)

    assert keys_in_front(torch.cat([made, room], dim=2), made.transpose(1, 2), 5) == 0
    assert keys_in_front(torch.cat([room, made], dim=2), made.transpose(1, 2), 5) == 4
    assert keys_in_front(torch.cat([room, made + 1.0], dim=2), made.transpose(1, 2), 5) == 0
    assert keys_in_front(made, made.transpose(1, 2), 5) == 0
    assert keys_in_front(None, made.transpose(1, 2), 5) == 0


def _attends_to_learned(model: Any, *, is_lost: bool) -> None:
    """Let all layers hand the attention interface learned keys and values in front of those of the cache."""
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        forward = attention.forward

        def call(hidden_states: Tensor, *args: Any, forward: Any = forward, number: int = index, **options: Any) -> Any:
            cache: Any = options.get("past_key_values")
            original = cache.update

            def update(keys: Tensor, values: Tensor, *rest: Any, **others: Any) -> tuple[Tensor, Tensor]:
                all_keys, all_values = original(keys, values, *rest, **others)
                front = [_rows(seed, all_keys) for seed in (1, 2)]
                if is_lost and keys.shape[2] == 1:
                    front[1] = torch.zeros_like(front[1])
                return torch.cat([front[0], all_keys], dim=2), torch.cat([front[1], all_values], dim=2)

            cache.update = update
            mask = options.get("attention_mask")
            n_tokens = hidden_states.shape[1]
            seen = torch.ones(n_tokens, cache.get_seq_length(number) + n_tokens, dtype=torch.bool)
            seen = seen.tril(seen.shape[1] - n_tokens) if mask is None else mask[0, 0, :, : seen.shape[1]]
            options["attention_mask"] = F.pad(seen, (N_LEARNED, 0), value=True)[None, None]
            try:
                return forward(hidden_states, *args, **options)
            finally:
                cache.update = original

        attention.forward = call


def _rows(seed: int, like: Tensor) -> Tensor:
    drawn = torch.randn(
        1, like.shape[1], N_LEARNED, like.shape[3], generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return drawn.to(like.dtype)


@pytest.mark.parametrize("is_lost", [False, pytest.param(True, marks=pytest.mark.matrix)])
def test_those_of_a_model_of_transformers(is_lost: bool) -> None:
    model = lively_model("llama", torch.bfloat16)
    _attends_to_learned(model, is_lost=is_lost)
    audit = kvdrift.audit(model, prompts={"p": [5, 9, 17, 3, 44, 2, 8, 61, 30]}, span=2)

    assert (audit.exit_code == 0) is not is_lost, (audit.verdict, audit.first_failure, audit.decision.reasons)
    if is_lost:
        assert audit.verdict is Verdict.MISMATCH
        assert audit.first_failure is not None
        assert (audit.first_failure.layer, audit.first_failure.site) == (0, Site.ATTN_CTX)
