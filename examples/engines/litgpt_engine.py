"""litgpt as an engine: kvdrift audit litgpt_engine:make (pip install litgpt)."""

from __future__ import annotations

from typing import Any

import torch
from litgpt.model import GPT, Config

import kvdrift


def engine_of(model: GPT) -> kvdrift.TorchEngine:
    """Wrap a model of litgpt. Its caches are modules of its blocks: each sequence puts its own ones there."""
    blocks = model.transformer.h

    def new_cache(max_length: int) -> list[Any]:
        model.set_kv_cache(batch_size=1, max_seq_length=model.max_seq_length, dtype=model.lm_head.weight.dtype)
        return [block.attn.kv_cache for block in blocks]

    def step(tokens: torch.Tensor, cache: list[Any], start: int) -> torch.Tensor:
        for block, kv_cache in zip(blocks, cache, strict=True):
            block.attn.kv_cache = kv_cache
        places = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        logits: torch.Tensor = model(tokens, places, input_pos_maxp1=start + tokens.shape[1])
        return logits

    def rewind(cache: list[Any], length: int) -> None:
        """Rows are written by position, and those behind `length` are masked until they are overwritten."""

    return kvdrift.TorchEngine(
        model, step=step, new_cache=new_cache, rewind=rewind, max_length=model.max_seq_length, name=model.config.name
    )


def make(name: str = "pythia-14m", **overrides: Any) -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    return engine_of(GPT(Config.from_name(name, **overrides)).eval())
