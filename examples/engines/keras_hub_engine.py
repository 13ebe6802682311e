"""keras-hub on torch as an engine: kvdrift audit keras_hub_engine:make (pip install keras-hub)."""

from __future__ import annotations

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras_hub
import torch

import kvdrift


def engine_of(model: Any, n_slots: int = 64) -> kvdrift.TorchEngine:
    """Wrap a Llama of keras-hub, whose layers are modules of torch. Each call returns a new cache."""
    backbone = model.backbone
    parts = {"embedding": backbone.token_embedding, "norm": backbone.layer_norm}
    modules = torch.nn.ModuleDict({**parts, "layers": torch.nn.ModuleList(backbone.transformer_layers)}).eval()

    def new_cache(max_length: int) -> torch.Tensor:
        dtype = next(modules.parameters()).dtype
        for layer in model._flatten_layers():
            layer.dtype_policy = str(dtype).removeprefix("torch.")  # what keras computes in, as the ladder has it
        heads, dim = backbone.num_key_value_heads, backbone.hidden_dim // backbone.num_query_heads
        return torch.zeros(1, backbone.num_layers, 2, n_slots, heads, dim, dtype=dtype)

    def step(tokens: torch.Tensor, cache: torch.Tensor, start: int) -> tuple[Any, Any]:
        logits, _, after = model.call_with_cache(tokens, cache, start)
        return logits, after

    def rewind(cache: torch.Tensor, length: int) -> None:
        """Rows are written by position, and those behind `length` are masked until they are overwritten."""

    return kvdrift.TorchEngine(modules, step=step, new_cache=new_cache, rewind=rewind, name="keras-hub")


def make() -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    sizes = {"num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 64, "intermediate_dim": 96}
    backbone = keras_hub.models.LlamaBackbone(vocabulary_size=96, num_layers=3, **sizes)
    return engine_of(keras_hub.models.LlamaCausalLM(backbone=backbone))
