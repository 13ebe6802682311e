"""keras-hub on torch as an engine: kvdrift audit keras_hub_engine:make (pip install keras-hub)."""

import os
from typing import Any

os.environ["KERAS_BACKEND"] = "torch"

import keras_hub
import torch

import kvdrift


def engine_of(model: Any) -> kvdrift.TorchEngine:
    """Wrap a Llama of keras-hub, whose layers are modules of torch. Each call returns a new cache."""
    backbone = model.backbone
    layers = torch.nn.ModuleList(backbone.transformer_layers)
    modules = torch.nn.ModuleDict({"in": backbone.token_embedding, "layers": layers, "out": backbone.layer_norm}).eval()

    def new_cache(max_length: int) -> torch.Tensor:
        for layer in model._flatten_layers():  # keras computes in what its layers say, and the ladder changes weights
            layer.dtype_policy = str(next(modules.parameters()).dtype).removeprefix("torch.")
        heads, dim = backbone.num_key_value_heads, backbone.hidden_dim // backbone.num_query_heads
        return torch.zeros(1, backbone.num_layers, 2, 64, heads, dim, dtype=next(modules.parameters()).dtype)

    return kvdrift.TorchEngine(
        modules,
        step=lambda tokens, cache, start: model.call_with_cache(tokens, cache, start)[::2],  # logits and the new cache
        new_cache=new_cache,
        rewind=lambda cache, length: None,  # rows behind `length` are masked until they are overwritten
        max_length=64,
    )


def make() -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    sizes = {"num_layers": 3, "num_query_heads": 4, "num_key_value_heads": 2, "hidden_dim": 64, "intermediate_dim": 96}
    model = keras_hub.models.LlamaCausalLM(backbone=keras_hub.models.LlamaBackbone(vocabulary_size=96, **sizes))
    return engine_of(model)
