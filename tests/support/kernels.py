"""Attention of our own for tests: registered with transformers, put into a model, taken out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, float], torch.Tensor]


@contextmanager
def attention_of(model: Any, attend: Attention) -> Iterator[None]:
    """Put `attend` in the place of a model's attention; it takes query, keys and values [row, head, token, dim], heads
    already repeated, and the scale, and returns the context [row, token, head, dim]."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    def wrapped(module: Any, query: Any, key: Any, value: Any, mask: Any, scaling: Any = None, **_: Any) -> Any:
        n = query.shape[1] // key.shape[1]
        return attend(query, key.repeat_interleave(n, 1), value.repeat_interleave(n, 1), scaling), None

    before = model.config._attn_implementation
    AttentionInterface.register("of_a_test", wrapped)
    AttentionMaskInterface.register("of_a_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("of_a_test")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of torch, whose last query sees all keys."""
    n, m = query.shape[2], key.shape[2]
    past = torch.ones(n, m, dtype=torch.bool).tril(m - n)
    context = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=past[None, None], scale=scale
    )
    return context.transpose(1, 2).contiguous()


def float32_decode(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """The same, but a decode step computes in float32 and rounds once, as kernels for one token do: right, and rounded
    otherwise than prefill."""
    if query.shape[2] > 1:
        return attend(query, key, value, scale)
    weights = (query.float() @ key.float().transpose(-1, -2) * scale).softmax(-1)
    return (weights @ value.float()).to(query.dtype).transpose(1, 2).contiguous()
