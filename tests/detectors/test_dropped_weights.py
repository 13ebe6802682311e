"""What decode kernels leave out by weight, windows that move, latent rows: each told from its neighbours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.vocabulary.causes import Cause
from tests.support.own_decoder import (
    DIM,
    HEADS,
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
    plain,
)

PASSES = (kvdrift.Verdict.EXACT, kvdrift.Verdict.STRUCTURAL_DRIFT)
Weigh = Callable[[Tensor], Tensor]


def _core(weigh: Weigh, hidden: bool = False) -> Core:
    """Attention whose decode steps change their weights [1, head, 1, key]; a hidden one shows no operands."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        k, v = by_query_head(keys), by_query_head(values)
        if hidden:
            q, k, v = (torch.from_numpy(np.array(rows.detach().double().tolist())) for rows in (query, k, v))
            weights = np.exp(np.einsum("bhqd,bhkd->bhqk", q.numpy(), k.numpy()) * SCALE)
            weights = weigh(torch.from_numpy(weights / weights.sum(-1, keepdims=True)))
            return torch.from_numpy(np.einsum("bhqk,bhkd->bhqd", weights.numpy(), v.numpy())).to(query.dtype)
        weights = weigh(torch.softmax(query @ k.transpose(-1, -2) * SCALE, dim=-1))
        return weights @ v

    return core


def _rescaled(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def _skipped(weights: Tensor) -> Tensor:
    return _rescaled(weights * (weights >= 0.1 * weights.amax(-1, keepdim=True)))


def _tiles(weights: Tensor) -> Tensor:
    tops = [torch.full_like(part, float(part.amax())) for head in weights[0, :, 0] for part in head.split(4)]
    looked_at = torch.cat(tops).reshape(weights.shape)
    return _rescaled(weights * (looked_at >= 0.2 * weights.amax(-1, keepdim=True)))


def _flushed(weights: Tensor) -> Tensor:
    return weights * (weights >= 2.0**-5)


def _top(weights: Tensor) -> Tensor:
    return _rescaled(weights * (weights >= weights.topk(5, dim=-1).values[..., -1:]))


@pytest.mark.parametrize(
    ("weigh", "hidden", "words"),
    [
        (_skipped, False, "of the largest of its head"),
        (_flushed, True, "and does not scale up the others"),
        pytest.param(_flushed, False, "and does not scale up the others", marks=pytest.mark.matrix),
        pytest.param(_top, False, "but the 5 of the largest weights", marks=pytest.mark.matrix),
        pytest.param(_tiles, False, "tiles of 4 keys", marks=pytest.mark.matrix),
    ],
)
def test_keys_of_little_weight_that_are_left_out_are_told_with_their_rule(
    weigh: Weigh, hidden: bool, words: str
) -> None:
    audit = audited(_core(weigh, hidden))

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.WEIGHTS_DROPPED, audit.diagnosis
    assert words in audit.diagnosis.text


def _noisy(weights: Tensor) -> Tensor:
    return _rescaled(weights * (1.0 + 0.3 * torch.cos(torch.arange(weights.shape[-1], dtype=weights.dtype) ** 2)))


def _without_the_first(weights: Tensor) -> Tensor:
    return _rescaled(torch.cat([0.0 * weights[..., :1], weights[..., 1:]], dim=-1))


@pytest.mark.parametrize("weigh", [_noisy, _without_the_first])
def test_other_weights_are_not_called_so(weigh: Weigh) -> None:
    audit = audited(_core(weigh))

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is not Cause.WEIGHTS_DROPPED, audit.diagnosis


@pytest.mark.parametrize("hidden", [False, True])
def test_right_weights_pass(hidden: bool) -> None:
    assert audited(_core(lambda weights: weights, hidden)).verdict in PASSES


# --------------------------------------------------------------------------------------------------- windows that move


def _window(moved: int) -> Core:
    """A window of six keys over a cache of all, which decode begins elsewhere."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        first = torch.arange(start, start + query.shape[2])[:, None] - 5 + (moved if decoding else 0)
        mask = causal(query, keys, start) & (torch.arange(keys.shape[2])[None, :] >= first)
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)

    return core


@pytest.mark.parametrize(
    ("moved", "cause"),
    [(2, Cause.WINDOW_TOO_SHORT), (-2, Cause.WINDOW_TOO_LONG), (-1, Cause.WINDOW_OFF_BY_ONE), (0, None)],
)
def test_a_window_that_no_option_names_is_told_by_its_moving(moved: int, cause: Cause | None) -> None:
    audit = audited(_window(moved))

    assert (audit.diagnosis is None) == (cause is None)
    assert audit.diagnosis is None or audit.diagnosis.cause is cause, audit.diagnosis


# ------------------------------------------------------------------------------- adapters beside what enters the cache


class _Adapted(Attention):
    """Values with an adapter beside their projection; decode steps of layer 1 take another adapter, or read rows of
    nobody's for their own."""

    def __init__(self, number: int, fault: str) -> None:
        super().__init__(number)
        self.fault = fault if number == 1 else ""
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, 2 * DIM, bias=False) for _ in range(2))

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        decoding = x.shape[1] == 1 and start > 0
        query, key, value = (
            torch.unflatten(rows, -1, (-1, DIM)).transpose(1, 2)
            for rows in (self.q_proj(x), self.k_proj(x), self._values(x, decoding))
        )
        rows = cache[self.number]
        if rows is not None:
            key, value = torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)
        cache[self.number] = key, value
        out: Tensor = self.o_proj(plain(query, key, value, start, decoding).transpose(1, 2).flatten(2))
        return out

    def _values(self, x: Tensor, decoding: bool) -> Tensor:
        value: Tensor = self.v_proj(x)
        if self.fault == "stale":  # no adapter: what is written is the projection
            return torch.cos(3.0 * x[..., : 2 * DIM]) if decoding else value
        return torch.add(value, self.adapters[int(decoding and self.fault == "adapter")](x))


@pytest.mark.parametrize(("fault", "cause"), [("adapter", Cause.BETWEEN_PROJECTIONS), ("stale", Cause.SLOT_STALE)])
def test_a_row_that_another_adapter_made_is_not_stale(fault: str, cause: Cause) -> None:
    layers = [Layer(0), Layer(1)]
    for layer in layers:
        layer.attention = _Adapted(layer.attention.number, fault)
    audit = kvdrift.audit(engine(Decoder(layers)), prompts=PROMPTS, span=2)

    assert str(audit.first_failure).endswith("layer 1 / v_cache")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is cause, audit.diagnosis


# ---------------------------------------------------------------------------------------------------------- latent rows


class _Latent(nn.Module):
    """Latent attention: prefill expands keys and values, decode attends to the latent rows with the weights absorbed.

    Decode of layer 1 expands its result by the weights of another head.
    """

    def __init__(self, number: int, moved: int) -> None:
        super().__init__()
        self.number, self.moved = number, moved if number == 1 else 0
        self.q_proj, self.o_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False), nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.down, self.up = nn.Linear(WIDTH, 16, bias=False), nn.Linear(16, 2 * HEADS * DIM, bias=False)

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        query, rows = torch.unflatten(self.q_proj(x), -1, (HEADS, DIM)).transpose(1, 2), self.down(x)[:, None]
        if cache[self.number] is not None:
            rows = torch.cat([cache[self.number][0], rows], dim=2)
        cache[self.number] = (rows,)
        if x.shape[1] > 1 or start == 0:
            key, value = torch.unflatten(self.up(rows[:, 0]), -1, (HEADS, 2 * DIM)).transpose(1, 2).chunk(2, dim=-1)
            mask = causal(query, key, start)
            context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=SCALE)
        else:
            of_keys, of_values = torch.unflatten(self.up.weight, 0, (HEADS, 2 * DIM)).chunk(2, dim=1)
            absorbed = torch.einsum("bhtd,hdl->bhtl", query, of_keys)
            weights = torch.softmax(torch.matmul(absorbed, rows.transpose(-1, -2)) * SCALE, dim=-1)
            context = torch.einsum("bhtl,hdl->bhtd", torch.matmul(weights, rows), of_values.roll(-self.moved, 0))
        out: Tensor = self.o_proj(context.transpose(1, 2).flatten(2))
        return out


@pytest.mark.parametrize("moved", [0, 1])
def test_weights_of_another_head_behind_latent_rows_are_told(moved: int) -> None:
    layers = [Layer(0), Layer(1)]
    for layer in layers:
        layer.attention = _Latent(layer.attention.number, moved)  # type: ignore[assignment]
    audit = kvdrift.audit(engine(Decoder(layers)), prompts=PROMPTS, span=2)

    if not moved:
        assert audit.verdict in PASSES
        return
    assert str(audit.first_failure).endswith("layer 1 / attn_ctx")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.HEAD_GROUP_WRONG, audit.diagnosis
    assert "[1, 2, 3, 0]" in audit.diagnosis.text
