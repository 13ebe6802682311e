"""A tiny model with an attention of a test's own, and nothing left of it behind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from kvdrift_bench.models.tiny import lively_model


@contextmanager
def attending(attend: Callable[..., Any], name: str = "of_a_test") -> Iterator[Any]:
    """Yield a lively Llama in bfloat16 that attends by `attend`, with the masks of sdpa."""
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    try:
        model = lively_model("llama", torch.bfloat16)
        model.set_attn_implementation(name)
        yield model
    finally:
        AttentionInterface._global_mapping.pop(name)
        AttentionMaskInterface._global_mapping.pop(name)
