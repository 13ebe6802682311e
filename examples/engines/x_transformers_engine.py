"""x-transformers as an engine: kvdrift audit x_transformers_engine:make (pip install x-transformers)."""

from __future__ import annotations

from copy import copy
from typing import Any

import torch
from x_transformers import Decoder, TransformerWrapper

import kvdrift


def engine_of(model: TransformerWrapper) -> kvdrift.TorchEngine:
    """Wrap a model of x-transformers. Each call returns a new cache, so a sequence keeps the last one in a box."""

    def step(tokens: torch.Tensor, cache: Any, start: int) -> tuple[torch.Tensor, Any]:
        options: dict[str, Any] = {} if cache is None else {"cache": cache, "input_not_include_cache": True}
        logits, after = model(tokens, return_intermediates=True, **options)
        return logits, after

    def rewind(cache: Any, length: int) -> Any:
        cache = copy(cache)  # copies what it keeps of each attention, and no tensor
        cache.cache_length = length
        for kept in cache.attn_intermediates:
            kept.cached_kv = tuple(rows[..., :length, :] for rows in kept.cached_kv)
        return cache

    return kvdrift.TorchEngine(
        model, step=step, new_cache=lambda max_length: None, rewind=rewind, max_length=model.max_seq_len
    )


def make(**options: Any) -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    layers = Decoder(dim=64, depth=3, heads=4, attn_dim_head=16, rotary_pos_emb=True, **options)
    return engine_of(TransformerWrapper(num_tokens=96, max_seq_len=128, attn_layers=layers).eval())
