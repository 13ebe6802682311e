"""TransformerLens as an engine: kvdrift audit transformer_lens_engine:make (pip install 'transformer-lens<4')."""

from __future__ import annotations

from typing import Any

import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

import kvdrift


def engine_of(model: Any) -> kvdrift.TorchEngine:
    """Wrap a HookedTransformer. Its hook points are modules, which return what they are given: sites by their names."""

    def new_cache(max_length: int) -> Any:
        model.cfg.dtype = model.W_E.dtype  # the ladder changes that of the weights alone
        return TransformerLensKeyValueCache.init_cache(model.cfg, model.W_E.device)

    def step(tokens: torch.Tensor, cache: Any, start: int) -> Any:
        return model(tokens, past_kv_cache=cache, attention_mask=torch.ones_like(tokens))

    def rewind(cache: Any, length: int) -> None:
        for entry in cache.entries:
            entry.past_keys, entry.past_values = entry.past_keys[:, :length], entry.past_values[:, :length]
        cache.previous_attention_mask = cache.previous_attention_mask[:, :length]

    attention = {"hook_q": "q_proj", "hook_k": "k_proj", "hook_v": "v_proj", "hook_z": "attn_ctx"}
    sites = {f"blocks.{{i}}.attn.{hook}": site for hook, site in attention.items()}
    return kvdrift.TorchEngine(model, step=step, new_cache=new_cache, rewind=rewind, sites=sites, max_length=64)


def make(**options: Any) -> kvdrift.TorchEngine:
    torch.manual_seed(0)
    small: dict[str, Any] = {"n_layers": 3, "d_model": 64, "n_ctx": 64, "d_head": 16, "d_vocab": 96, "act_fn": "silu"}
    rotary = {"positional_embedding_type": "rotary", "rotary_dim": 16, "normalization_type": "RMS", "gated_mlp": True}
    return engine_of(HookedTransformer(HookedTransformerConfig(**{**small, **rotary, **options})).eval())
