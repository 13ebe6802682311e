"""The default configuration of an architecture, made small: plain data, no framework.

Sizes are recognised by their names. What is a number for each layer is cut to the first layers that show every kind of
layer once; what has no rule keeps its default, so that a new option is run as it comes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

WIDTH = 64
VOCABULARY = 128
POSITIONS = 128
WINDOW = 8
_HEADS, _DIM, _EXPERTS = 4, 16, 4

# The first pattern that matches the whole name of an option gives the largest value that it keeps.
_LARGEST: tuple[tuple[str, int], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?|byte_vocab_size|vocab_size_per_layer_input", VOCABULARY),
    (r"ngram_vocab_size_base|split_ngram_parts|encoder_hash_byte_group_vocab", 64),
    (r"(original_)?max_position_embeddings|n_positions|n_ctx|max_seq_len|context_length|model_max_length", POSITIONS),
    (r"max_(source|target)_positions", POSITIONS),
    (r"(attention_)?(sliding_)?window(_size)?|local_attention(_window_len)?|keep_window_size", WINDOW),
    (r"sliding_window_size|attention_chunk_size|index_topk|(lsh|local)_attn_chunk_length", WINDOW),
    (r"(mamba_)?chunk_size|block_size", WINDOW),
    (r"index_block_size", 4),
    (r"index_topk_blocks", 2),
    (r"rel_extent", 16),
    (r"d_rel", 4),
    (r"kv_lora_rank|qk_nope_head_dim|v_head_dim|mamba_d_state|state_size|ssm_state_size", 16),
    (r"q_lora_rank|o_lora_rank|hc_lowrank|gated_norm_rank|adapter_rank", 16),
    (r"qk_rope_head_dim|rotary_dim|mamba_dt_rank|time_step_rank|laurel_rank|mamba_d_rank", 8),
    (r"qk_head_dim", 24),
    (r"mamba_d_ssm|lru_width_2", 128),
    (r"(mamba_n|n_mamba|mamba_num)_heads|mamba_num_heads", 8),
    (r"(mamba_)?n_?groups|mamba_ngroups|o_groups|num_mem_blocks|num_query_groups", 2),
    (r"mamba_d_head|mamba_head_?dim", _DIM),
    (r"linear_num_key_heads", 2),
    (r"\w*head_dim|kv_channels|dim_head|d_head|attention_head_size|index_head_dim", _DIM),
    # A key whose products with all heads of an index are negative has a score of exactly zero, and equals are taken in
    # any order: with few heads that is the rule, and with those of a real model the exception.
    (r"index_n_heads", 16),
    (r"\w*num_attention_heads|n_heads?|(\w+_)?num_(value_)?heads|(\w+_)?attention_heads", _HEADS),
    (r"n_group|num_expert_group", 2),
    (r"topk_group", 1),
    (r"num_experts_per_tok(en)?|moe_topk|moe_k|top_k_experts|n_shared_experts|(moe_)?num_shared_experts", 2),
    (r"(moe_)?num_(local_)?experts|n_routed_experts|zero_expert_num", _EXPERTS),
    (r"moe_intermediate_size|expert_ffn_hidden_size|\w*shared\w*intermediate_size|router_hidden_size", 32),
    (r"ple_embed_dim|hidden_size_per_layer_input|\w+_embed_dim|prompt_mid_dim|dim_model_base", 16),
    (r"(\w+_)?(intermediate|ffn|ffn_hidden|feed_forward)_(size|dim)(_mlp)?|dff|dim_ff|n_inner|d_inner", 96),
    (r"hidden_size|(d|dim)_model|n_embd|emb_dim|embedding_(dim|size)|(in|out)put_embedding_size|lru_width", WIDTH),
    (r"word_embed_proj_dim|backbone_hidden_size", WIDTH),
    (r"num_centroids|prompt_length", 8),
    (r"first_k_dense_replace|num_dense_layers", 1),
    (r"num_kv_shared_layers", 1),
)
_RULES = tuple((re.compile(pattern), largest) for pattern, largest in _LARGEST)
_LAYERS = re.compile(
    r"num_hidden_layers|n_layers?|num_layers|num_blocks|(num_)?(decoder|encoder)_layers|num_layers_per_stack"
)
_KV_HEADS = re.compile(r"\w*num_key_value_heads|num_kv_heads")
_TOKEN = re.compile(r"\w+_(token_id|token_index)|(pad|unk|bos|eos|mask)_index")
# Parts of a model that is more than its text decoder; the parts are made small by the same rules.
_PARTS = re.compile(r"\w*_config|decoder|(text|audio)_encoder")


def shrink(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a configuration that become smaller, with their new values.

    >>> shrink({"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000})
    {'hidden_size': 64, 'num_attention_heads': 4, 'num_key_value_heads': 2, 'vocab_size': 128}
    >>> shrink({"num_hidden_layers": 6, "layer_types": ["sliding", "sliding", "full"] * 2})
    {'num_hidden_layers': 2, 'layer_types': ['sliding', 'full']}
    """
    kept = layers_kept(settings)
    changed: dict[str, Any] = {}
    for name, value in settings.items():
        smaller = _smaller(name, value, settings, kept)
        if smaller is not value and smaller != value:
            changed[name] = smaller
    return changed


def layers_kept(settings: Mapping[str, Any]) -> list[int]:
    """Return which layers stay: at least two, and the first of each kind that a list by layer tells apart."""
    n_layers = _n_layers(settings)
    lists = [value for value in settings.values() if _is_by_layer(value, n_layers)]
    found: set[int] = set()
    for values in lists:
        first: dict[str, int] = {}
        for layer, value in enumerate(values):
            first.setdefault(repr(value), layer)
        if len(first) <= 4:  # more of them are not kinds but numbers
            found |= set(first.values())
    for layer in range(n_layers):
        if len(found) >= 2:
            break
        found.add(layer)
    return sorted(found)


def _n_layers(settings: Mapping[str, Any]) -> int:
    counts = [value for name, value in settings.items() if _LAYERS.fullmatch(name) and isinstance(value, int)]
    return max(counts, default=2)


def _is_by_layer(value: Any, n_layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == n_layers and n_layers > 2


def _smaller(name: str, value: Any, settings: Mapping[str, Any], kept: Sequence[int]) -> Any:
    if _is_by_layer(value, _n_layers(settings)):
        return [small(name.removesuffix("_per_layer"), value[layer]) for layer in kept]
    if isinstance(value, bool) or value is None:
        return value
    if isinstance(value, dict) and _PARTS.fullmatch(name) and name != "per_layer_config":
        return {**value, **shrink(value)}
    if name == "per_layer_config" and isinstance(value, dict):
        return {
            f"{new:02d}": {**value[key], **shrink(value[key])}
            for new, old in enumerate(kept)
            for key in value
            if int(key) == old
        }
    if not isinstance(value, int):
        return value
    if _LAYERS.fullmatch(name):
        return min(value, len(kept))
    if _KV_HEADS.fullmatch(name):
        heads = settings.get(name.replace("key_value", "attention").replace("kv", "attention"), value)
        return min(value, _HEADS if value == heads else 2)
    if _TOKEN.fullmatch(name):
        return value if 0 <= value < VOCABULARY else VOCABULARY - 1 - value % 8
    return small(name, value)


def small(name: str, value: Any) -> Any:
    """Return a size as the name of its option allows it; anything else, and a size without a rule, as it is."""
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    return next((min(value, largest) for pattern, largest in _RULES if pattern.fullmatch(name)), value)
