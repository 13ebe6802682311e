"""The configurations of the tiny models: one for each architecture that kvdrift is tested on."""

from __future__ import annotations

from typing import Any

_SMALL = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}

# Model type of transformers and its options, by name. Windows are shorter than the prompts that are run on them.
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GQA),
    "qwen3": ("qwen3", {**_GQA, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {**_GQA, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
    "gemma3": ("gemma3_text", {**_GQA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gpt2": ("gpt2", {"vocab_size": 128, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
    "gpt_neox": ("gpt_neox", {**_SMALL, "rotary_pct": 0.25}),
    "mixtral": ("mixtral", {**_GQA, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe",
        {**_GQA, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    ),
    "phi": ("phi", _SMALL),
    "phi3": ("phi3", {**_GQA, "pad_token_id": 0}),
    "falcon": ("falcon", {**_SMALL, "alibi": True, "multi_query": False, "new_decoder_architecture": False}),
    "bloom": ("bloom", {"vocab_size": 128, "hidden_size": 64, "n_layer": 3, "n_head": 4}),
    "opt": ("opt", {**_SMALL, "ffn_dim": 96, "word_embed_proj_dim": 64, "do_layer_norm_before": True}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GQA,
            "head_dim": 16,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mistral": ("mistral", {**_GQA, "head_dim": 16, "sliding_window": 8}),
    # The rotary tables change behind 24 tokens.
    "phi3_longrope": (
        "phi3",
        {
            **_GQA,
            "pad_token_id": 0,
            "original_max_position_embeddings": 24,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0, 1.1, 1.2, 1.3, 1.5, 1.7, 2.0, 2.5],
                "long_factor": [1.0, 1.5, 2.0, 3.0, 5.0, 8.0, 12.0, 20.0],
                "original_max_position_embeddings": 24,
            },
        },
    ),
    "llama_ntk": (
        "llama",
        {
            **_GQA,
            "max_position_embeddings": 24,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 32,
            "n_shared_experts": 1,
        },
    ),
    "gemma3n": (
        "gemma3n_text",
        {
            **_GQA,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "intermediate_size": [96] * 4,
            "vocab_size_per_layer_input": 128,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
            "sliding_window": 8,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        },
    ),
    "bamba": (
        "bamba",
        {
            **_GQA,
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 8,
        },
    ),
    "qwen3_next": (
        "qwen3_next",
        {
            **_GQA,
            "head_dim": 16,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "mamba": (
        "mamba",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "state_size": 16,
            "time_step_rank": 8,
            "initializer_range": 0.02,
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "expand": 2,
            "chunk_size": 8,
        },
    ),
    "jamba": (
        "jamba",
        {
            **_GQA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "attn_layer_period": 3,
            "attn_layer_offset": 1,
            "mamba_d_state": 16,
            "mamba_dt_rank": 8,
        },
    ),
    "falcon_h1": (
        "falcon_h1",
        {
            **_GQA,
            "head_dim": 16,
            "mamba_d_ssm": 128,
            "mamba_n_heads": 8,
            "mamba_d_head": 16,
            "mamba_d_state": 16,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
    "zamba2": (
        "zamba2",
        {
            **_SMALL,
            "num_key_value_heads": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba"],
            "n_mamba_heads": 8,
            "mamba_headdim": 16,
            "mamba_d_state": 16,
            "mamba_ngroups": 1,
            "num_mem_blocks": 1,
            "adapter_rank": 8,
            "use_mem_rope": True,
            "chunk_size": 8,
        },
    ),
}
