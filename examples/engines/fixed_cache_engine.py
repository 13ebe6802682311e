"""The decoder of fixed_cache_decoder.py as an engine: kvdrift audit fixed_cache_engine:make."""

from __future__ import annotations

import torch
from fixed_cache_decoder import Decoder, Rows, new_rows

import kvdrift


def engine_of(model: Decoder) -> kvdrift.TorchEngine:
    """Wrap the decoder. Its rows lie in its blocks: each sequence puts its own ones there."""

    def step(tokens: torch.Tensor, cache: list[Rows], start: int) -> torch.Tensor:
        for layer, rows in zip(model.layers, cache, strict=True):
            layer.attention.rows = rows
        logits: torch.Tensor = model(tokens, torch.arange(start, start + tokens.shape[1]))
        return logits

    def rewind(cache: list[Rows], length: int) -> None:
        """Rows are written by position, and those behind `length` are masked until they are overwritten."""

    return kvdrift.TorchEngine(
        model,
        step=step,
        new_cache=lambda max_length: new_rows(model, model.n_slots),
        rewind=rewind,
        sites={"norm": "final_norm_out", "layers.{i}.attention.wo": ("attn_ctx", "attn_out")},
        max_length=model.n_slots,
    )


def make() -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    model = Decoder().eval()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.25)
    return engine_of(model)
