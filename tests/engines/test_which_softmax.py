"""A softmax inside of attention that weighs something else than keys is not taken for the scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.softmax import weighs_keys
from tests.support.attention import attending

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30], "short": [7, 3]}


def _spans(query: Tensor, key: Tensor, value: Tensor, scale: float, size: int) -> tuple[Tensor, Tensor]:
    """Contexts [row, head, 1, span, dim] and log-sums [row, head, 1, span] of spans of `size` keys, without softmax."""
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    parts, sums = [], []
    for first in range(0, key.shape[2], size):
        scores = query @ key[:, :, first : first + size].transpose(2, 3) * scale
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp()
        total = weights.sum(-1, keepdim=True)
        parts.append(weights / total @ value[:, :, first : first + size])
        sums.append(top + total.log())
    return torch.stack(parts, dim=3), torch.cat(sums, dim=-1)


def _merged(size: int) -> Callable[..., Tensor]:
    def attend(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        parts, sums = _spans(query, key, value, scale, size)
        return (torch.softmax(sums, dim=-1)[..., None] * parts).sum(3)

    return attend


def _as_many_spans_as_keys(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """One span has all keys, and the others, as many as make up the number of keys, are empty."""
    parts, sums = _spans(query, key, value, scale, key.shape[2])
    empty = torch.full_like(sums, -torch.inf).expand(*sums.shape[:3], key.shape[2] - 1)
    weights = torch.softmax(torch.cat([sums, empty], dim=-1), dim=-1)
    return (weights[..., :1, None] * parts).sum(3)


def _merged_of_base_two(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    parts, sums = _spans(query, key, value, scale, 4)
    return (torch.softmax(sums * 1.4426950408889634, dim=-1)[..., None] * parts).sum(3)


def _without_the_second_key(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    keep = [index for index in range(key.shape[2]) if index != 1]
    key, value = (t[:, :, keep].repeat_interleave(query.shape[1] // t.shape[1], dim=1) for t in (key, value))
    return torch.softmax(query @ key.transpose(2, 3) * scale, dim=-1) @ value


@contextmanager
def _attending(decode: Callable[..., Tensor]) -> Iterator[Any]:
    """A tiny model of which single tokens attend by `decode`."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        if query.shape[2] > 1:
            return sdpa_attention_forward(module, query, key, value, mask, **options)
        scale = options.get("scaling") or query.shape[-1] ** -0.5
        return decode(query, key, value, scale).transpose(1, 2).contiguous(), None

    with attending(attend, "spans_at_decode") as model:
        yield model


@pytest.mark.parametrize("decode", [_merged(4), _as_many_spans_as_keys], ids=["spans of 4", "as many spans as keys"])
def test_the_weights_of_a_merge_are_not_taken_for_scores(decode: Callable[..., Tensor]) -> None:
    with _attending(decode) as model:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is kvdrift.Verdict.STRUCTURAL_DRIFT, audit.first_failure


def test_a_wrong_merge_begins_at_the_context_and_not_at_the_scores() -> None:
    with _attending(_merged_of_base_two) as model:
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"]}, span=2)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.first_failure is not None
    assert str(audit.first_failure.site) == "attn_ctx"


def test_a_softmax_over_fewer_keys_than_attention_got_is_believed() -> None:
    with _attending(_without_the_second_key) as model:
        audit = kvdrift.audit(model, prompts={"p": PROMPTS["p"]}, span=2)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert str(audit.first_failure) == "p / pos 9 / layer 0 / attn_scores"
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "key_lost_middle"


def _operands(keys: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores and weights [1, 2, keys], values [1, keys, 3] and the context [1, 2, 3] of a random call."""
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(1, 2, keys, generator=generator)
    values = torch.randn(1, keys, 3, generator=generator)
    probs = torch.softmax(scores, dim=-1)
    return scores, probs, values, torch.einsum("rhk,kd->rhd", probs, values[0])


def test_weights_that_make_the_context_are_believed_whatever_the_operands_say() -> None:
    scores, probs, values, context = _operands(6)
    scaled = torch.softmax(1.5 * scores, dim=-1)
    wrong = torch.einsum("rhk,kd->rhd", scaled, values[0])

    assert weighs_keys(scores, probs, lambda: (scores, probs), [values], [context])
    assert weighs_keys(1.5 * scores, scaled, lambda: (scores, probs), [values], [wrong])


def test_weights_that_do_not_make_the_context_give_way_to_those_that_do() -> None:
    scores, probs, values, context = _operands(6)
    others = torch.softmax(scores.flip(-1), dim=-1)

    assert not weighs_keys(scores.flip(-1), others, lambda: (scores, probs), [values], [context])
    assert weighs_keys(scores.flip(-1), others, lambda: None, [values], [context])


def test_what_is_not_a_number_decides_nothing() -> None:
    scores, probs, values, context = _operands(6)

    assert weighs_keys(scores, probs, lambda: (scores, probs), [values], [context * torch.nan])
