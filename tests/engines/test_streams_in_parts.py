"""Decode steps that add and normalise in one kernel, or attend without the attention module."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.residual import parts_of, stream_of, with_stream
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import (
    DIM,
    PROMPTS,
    Decoder,
    Layer,
    RMSNorm,
    engine,
    first_of,
    plain,
)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
Ladder = Literal["model", "off"]


class _AddNorm(RMSNorm):
    """Normalises a row, or the sum of two and gives that sum as well."""

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return super().forward(x)
        total = x + residual
        return super().forward(total), total


class _Deferring(Layer):
    """Hands on in decode what it adds beside what that is added to; `share` of one of them in layer 1."""

    wrong: str | None = None

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm, self.mlp_norm = _AddNorm(), _AddNorm()

    def forward(self, x: Any, cache: list[Any], start: int) -> Any:
        if not isinstance(x, tuple) and (x.shape[1] > 1 or start == 0):
            return super().forward(x, cache, start)
        normed, residual = self.norm(*x) if isinstance(x, tuple) else (self.norm(x), x)
        added = self.attention(normed, cache, start)
        if self.attention.number == 1:
            added = added * 1.05 if self.wrong == "attention" else added
            residual = residual * 0.95 if self.wrong == "residual" else residual
        normed, residual = self.mlp_norm(added, residual)
        added = self.mlp(normed)
        return (added * 1.05 if self.wrong == "mlp" and self.attention.number == 0 else added), residual


class _DeferringDecoder(Decoder):
    def __init__(self, wrong: str | None) -> None:
        kind = type("Deferring", (_Deferring,), {"wrong": wrong})
        super().__init__([kind(n) for n in range(2)])
        self.norm = _AddNorm()

    def forward(self, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        x: Any = self.tokens(ids) + self.places(torch.arange(start, start + ids.shape[1]))
        for layer in self._order:
            x = layer(x, cache, start)
        logits: Tensor = self.head(self.norm(*x)[0] if isinstance(x, tuple) else self.norm(x))
        return logits


def _audited(model: Decoder, dtype: torch.dtype, ladder: Ladder) -> Any:
    return kvdrift.audit(engine(model, dtype), prompts=PROMPTS, span=2, ladder=ladder)


@pytest.mark.parametrize(
    ("dtype", "ladder"), [(torch.float32, "model"), (torch.bfloat16, "model"), (torch.bfloat16, "off")]
)
def test_a_stream_that_decode_hands_on_in_two_parts_is_their_sum(dtype: torch.dtype, ladder: Ladder) -> None:
    audit = _audited(_DeferringDecoder(None), dtype, ladder)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)
    assert not [item for item in audit.view["caveats"] if item["code"] == "TRACE_OFFSET"]


@pytest.mark.parametrize(
    ("wrong", "where"),
    [("attention", (1, "resid_attn")), ("residual", (1, "resid_attn")), ("mlp", (0, "layer_out"))],
)
def test_a_part_of_a_stream_that_is_wrong_is_found_in_the_sum(wrong: str, where: tuple[int, str]) -> None:
    audit = _audited(_DeferringDecoder(wrong), torch.float32, "model")

    assert (audit.verdict, first_of(audit)) == (Verdict.MISMATCH, where)


def test_a_sum_is_replaced_by_one_part_and_zeros() -> None:
    first, second, other = torch.randn(1, 3, 8), torch.randn(1, 3, 8), torch.randn(1, 3)

    assert parts_of((first, other), {}) is None
    assert torch.equal(torch.as_tensor(stream_of(((first, second), 5), {})), first + second)
    parts = parts_of((other,), {})
    assert parts is None
    parts = parts_of(((first, second), other), {})
    assert parts is not None
    args, kwargs = with_stream(((first, second), other), {"residual": second}, parts, first * 2.0)
    assert torch.equal(args[0][0], first * 2.0)
    assert not args[0][1].any()
    assert args[1] is other
    assert not kwargs["residual"].any()


class _Bypassing(Layer):
    """Attends in decode by the weights of its attention module, which is not called; a value is `lost` in layer 1."""

    lost = False

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        if x.shape[1] > 1 or start == 0:
            return super().forward(x, cache, start)
        made = self.attention
        normed = self.norm(x)
        query, key, value = (
            torch.unflatten(F.linear(normed, each.weight), -1, (-1, DIM)).transpose(1, 2)
            for each in (made.q_proj, made.k_proj, made.v_proj)
        )
        keys, values = (torch.cat([rows, new], 2) for rows, new in zip(cache[made.number], (key, value), strict=True))
        cache[made.number] = keys, values
        if self.lost and made.number == 1:
            values = torch.cat([values[:, :, 1:2], values[:, :, 1:]], dim=2)
        context = plain(query, keys, values, start, True).transpose(1, 2).flatten(2)
        x = x + F.linear(context, made.o_proj.weight)
        return torch.add(x, self.mlp(self.mlp_norm(x)))


class _Losing(_Bypassing):
    lost = True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_decode_computes_without_its_module_is_judged_by_the_sum_behind_it(dtype: torch.dtype) -> None:
    clean, lost = (_audited(Decoder([kind(n) for n in range(2)]), dtype, "model") for kind in (_Bypassing, _Losing))

    assert clean.verdict in PASSES, (clean.first_failure, clean.decision.reasons)
    assert "FUSED" in {item["code"] for item in clean.view["caveats"]}
    assert (lost.verdict, first_of(lost)) == (Verdict.MISMATCH, (1, "resid_attn"))


def test_without_the_ladder_nothing_is_said_of_attention_that_shows_nothing() -> None:
    audit = _audited(Decoder([_Bypassing(n) for n in range(2)]), torch.bfloat16, "off")

    assert audit.verdict is Verdict.INCONCLUSIVE
