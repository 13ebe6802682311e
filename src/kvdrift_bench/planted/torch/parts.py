"""The parts of a transformers model into which faults are planted, and what a model lacks that a fault needs."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift_bench.planted.facts import fault_layer_of
from kvdrift_bench.planted.torch.model import Applies

_HALF = (torch.bfloat16, torch.float16)
_FUSED = ("qkv_proj", "c_attn", "query_key_value")
_HEADS_OUT = ("o_proj", "dense", "c_proj", "out_proj")
_MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
_ACTIVATION = ("act_fn", "act", "activation_fn", "gelu_impl")
_ROUTER = ("gate", "router")


def is_half(tensor: Tensor) -> bool:
    """Whether a tensor has a 16-bit dtype: what a fault that is keyed to the dtype asks."""
    return tensor.dtype in _HALF


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in float64 if it is in float64 already."""
    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """Return the decoder layers, in order."""
    n_layers = int(model.config.num_hidden_layers)  # type: ignore[union-attr, arg-type]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == n_layers:
            return list(module)
    return []


def attention_modules(model: nn.Module) -> dict[int, nn.Module]:
    """Return the attention modules by the number of their layer."""
    found: dict[int, nn.Module] = {}
    for layer, block in enumerate(decoder_layers(model)):
        for module in block.modules():
            if type(module).__name__.endswith("Attention") and hasattr(module, "layer_idx"):
                found.setdefault(layer, module)
    return found


def attentions(model: nn.Module) -> list[nn.Module]:
    """Return the attention modules, in the order of their layers."""
    return list(attention_modules(model).values())


def mixer_modules(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep a convolution state and a recurrent state."""
    return [module for module in model.modules() if hasattr(module, "conv1d") and hasattr(module, "A_log")]


def children(module: nn.Module, names: Iterable[str]) -> Iterator[nn.Module]:
    """Yield the first direct child that has one of `names`."""
    for name in names:
        child = getattr(module, name, None)
        if isinstance(child, nn.Module):
            yield child
            return


def in_attentions(*names: str, layer: int | None = None) -> Any:
    """Return the function that finds a child of every attention module, or of that of one layer."""

    def find(model: nn.Module) -> list[nn.Module]:
        attentions = attention_modules(model).items()
        return [child for at, module in attentions if layer in (None, at) for child in children(module, names)]

    return find


def fused_projections(model: nn.Module) -> list[nn.Module]:
    """Return the projections that compute queries, keys and values at once."""
    return list(in_attentions(*_FUSED)(model))


def output_projections(model: nn.Module) -> list[nn.Module]:
    """Return the projections behind attention."""
    return list(in_attentions(*_HEADS_OUT)(model))


def mlps(model: nn.Module) -> list[nn.Module]:
    """Return the feed-forward modules."""
    return [child for block in decoder_layers(model) for child in children(block, _MLP)]


def activations(model: nn.Module) -> list[nn.Module]:
    """Return the activation modules of plain (not mixture-of-experts) feed-forward modules."""
    return [child for mlp in mlps(model) for child in children(mlp, _ACTIVATION)]


def routers(model: nn.Module) -> list[nn.Module]:
    """Return the modules that choose experts."""
    return [child for mlp in mlps(model) for child in children(mlp, _ROUTER)]


def norms(model: nn.Module) -> list[nn.Module]:
    """Return every norm of the model."""
    return [module for module in model.modules() if "norm" in type(module).__name__.lower()]


def layer_norms(model: nn.Module) -> list[nn.Module]:
    """Return the norms in front of attention, one for each layer."""
    return [child for block in decoder_layers(model) for child in children(block, ("input_layernorm", "ln_1", "norm"))]


def final_norms(model: Any) -> list[nn.Module]:
    """Return the norm behind the last layer."""
    return list(children(model.base_model, ("norm", "ln_f", "final_layernorm", "norm_f", "final_layer_norm")))


def embeddings(model: Any) -> list[nn.Module]:
    """Return the token embedding."""
    return [model.get_input_embeddings()]


def heads(model: Any) -> list[nn.Module]:
    """Return the language-modelling head."""
    return [model.get_output_embeddings()]


def rotaries(model: nn.Module) -> list[nn.Module]:
    """Return the modules that compute cosines and sines."""
    return [module for module in model.modules() if type(module).__name__.endswith("RotaryEmbedding")]


def frequencies(module: nn.Module) -> list[str]:
    """Return the names of the frequency tables that a rotary module reads."""
    return [name for name in module._buffers if name.endswith("inv_freq") and "original" not in name]


def window_of(model: Any, layer: int) -> int | None:
    """Return the sliding window of a layer, None if it sees everything."""
    kinds = getattr(model.config, "layer_types", None)
    if kinds is None or kinds[layer] != "sliding_attention":
        return None
    return int(model.config.sliding_window)


def first_sliding(model: nn.Module) -> int:
    """Return the first layer with a sliding window."""
    layers = range(len(decoder_layers(model)))
    return next(layer for layer in layers if window_of(model, layer) is not None)


def first_full(model: nn.Module) -> int:
    """Return the first layer without a sliding window."""
    return next(layer for layer in range(len(decoder_layers(model))) if window_of(model, layer) is None)


def two_thirds_up(model: nn.Module) -> int:
    """Return the layer that faults of one layer are planted in, of a model whose layers all attend."""
    return fault_layer_of(len(attention_modules(model)))


# --------------------------------------------------------------------------------- why a model cannot carry a fault


def needs_cache(model: nn.Module) -> str | None:
    """Keys and values in a cache."""
    return None if attention_modules(model) else "no layer keeps keys and values"


def needs_interface(model: nn.Module) -> str | None:
    """An attention function that is looked up."""
    if getattr(type(model), "_supports_attention_backend", False):
        return None
    return "attention is computed inside the model, not by a function that is looked up"


def needs_groups(model: nn.Module) -> str | None:
    """Several query heads for one kv head, several kv heads."""
    reason = needs_interface(model)
    if reason is not None:
        return reason
    kv_heads = getattr(model.config, "num_key_value_heads", None)
    query_heads = getattr(model.config, "num_attention_heads", None)
    if kv_heads in (None, 1, query_heads):
        return "no query heads share one of several kv heads"
    return None


def needs_rotation(model: nn.Module) -> str | None:
    """Rotary position embedding."""
    sources = [sys.modules[type(module).__module__] for module in attention_modules(model).values()]
    if rotaries(model) and all(hasattr(source, "apply_rotary_pos_emb") for source in sources):
        return None
    return "no rotary position embedding"


def needs_positions(model: nn.Module) -> str | None:
    """Positions that the model can be called with."""
    learned = any(hasattr(model.base_model, name) for name in ("wpe", "embed_positions"))
    return None if rotaries(model) or learned else "no positions are passed to the model"


def needs_window(model: nn.Module) -> str | None:
    """A layer with a sliding window."""
    kinds = getattr(model.config, "layer_types", None) or ()
    return None if "sliding_attention" in kinds else "no layer has a sliding window"


def needs_mixed_layers(model: nn.Module) -> str | None:
    """Layers with and without a sliding window."""
    kinds = set(getattr(model.config, "layer_types", None) or ())
    return None if {"sliding_attention", "full_attention"} <= kinds else "all layers see the same keys"


def needs_config(name: str, reason: str) -> Applies:
    """Return a check that the configuration sets `name`."""
    return lambda model: None if getattr(model.config, name, None) else reason


def needs_modules(find: Any, reason: str) -> Applies:
    """Return a check that `find` finds something in the model."""
    return lambda model: None if find(model) else reason


def needs_sinks(model: nn.Module) -> str | None:
    """Learned attention sinks."""
    found = any(hasattr(module, "sinks") for module in attention_modules(model).values())
    return None if found else "no attention sinks"


def needs_states(model: nn.Module) -> str | None:
    """A recurrent state."""
    return None if mixer_modules(model) else "no recurrent state"


def needs_alibi(model: nn.Module) -> str | None:
    """ALiBi as an argument of the attention module."""
    return None if model.config.model_type == "bloom" else "no ALiBi argument"  # type: ignore[union-attr]
