"""What some types need besides smaller sizes: options without a default, and layers whose order other options tell.

A type that is not named here is made small by the names of its options alone.
"""

from __future__ import annotations

from typing import Any

_EXPERTS = {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2}
_INDEXER = {
    "indexer_n_heads": 4,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 8,
    "indexer_block_size": 4,
    "indexer_compress_ratio": 2,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _DEFAULT_ROPE, "sliding_attention": _DEFAULT_ROPE}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}},
    "deepseek_v2": _EXPERTS,
    "dots1": _EXPERTS,
    "dots3_note_text": {"head_dim": 24},  # of a query: with and without position
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hrm_text": {"num_layers_per_stack": 1, "num_hidden_layers": 8},
    "hunyuan_v1_dense": {"rope_parameters": _DEFAULT_ROPE},
    "hunyuan_v1_moe": {"rope_parameters": _DEFAULT_ROPE},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"rope_parameters": _DEFAULT_ROPE},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": [8, 16], "axial_pos_embds_dim": [32, 32]},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]},
}
# What stands for a type whose registered class takes a part of its configuration.
PARTS = {"musicgen": "decoder", "musicgen_melody": "decoder"}
# Options that have no default, whatever the type.
UNSET: dict[str, Any] = {"head_dim": 16, **_INDEXER}

__all__ = ["OWN", "PARTS", "UNSET"]
