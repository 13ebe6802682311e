"""What types of mlx-lm need besides small sizes: values of arguments without a default, and the order of layers."""

from __future__ import annotations

from typing import Any

# By the name of an argument that has no default; the first pattern that matches the whole name is taken.
VALUES: tuple[tuple[str, Any], ...] = (
    (r".*eps(ilon)?", 1e-5),
    (r"(swa_)?rope_theta|rotary_emb_base", 10000.0),
    (r"rotary_pct|partial_rotary_factor", 0.5),
    (r"attention_multiplier", 0.25),
    (r"gegelu_limit", 20.0),
    (r"logits_soft_cap", 30.0),
    (r"hidden_act", "silu"),
    (r"norm_topk_prob|use_qk_norm|qk_norm|use_conv_bias|mla_scale_q_lora|mla_scale_kv_lora", True),
    (r"conv_kernel|mamba_d_conv|conv1d_width|linear_conv_kernel_dim", 4),
    (r"conv_L_cache", 3),
    (r"block_multiple_of|moe_hidden_size", 32),
    (r"interleave_moe_layer_step", 2),
    (r"conv_window|mamba_expand|cla_share_factor|expert_layer_period|attn_layer_period|layer_group_size", 2),
    (r"attn_layer_offset|expert_layer_offset|decoder_sparse_step|moe_layer_freq", 1),
    (r"group_norm_size|num_shared_expert|num_kv_reuse_layers", 1),
    (r"layer_types", ["sliding_attention", "full_attention"] * 2),
    (r"layer_rope_theta", [10000.0] * 4),
    (r"hybrid_layer_pattern", [1, 0, 1, 0]),
    (r"is_moe_layer", [False, True, True, True]),
    (r"no_rope_layers", [1, 1, 1, 0]),
    (r"mlp_only_layers", []),
    (r"topk_method", "noaux_tc"),
    (r"scoring_func", "sigmoid"),
    (r"rope_parameters", {"rope_type": "default", "rope_theta": 10000.0}),
    (r"rope_scaling", {"rope_type": "default"}),
    (r"time_step_limit", (0.0, 100.0)),
    (r"time_step_rank|\w+_low_rank_dim", 8),
    (r"d_model|model_dim|embedding_size|hidden_dim|block_dim", 64),
    (r"mlp_hidden_size|ff_intermediate_size|shared_intermediate_size", 96),
    (r"n_heads?|num_heads|num_attention_heads", 4),
)
# The text decoder of a type that is more than it: module and class of its arguments.
TEXT_OF: dict[str, str] = {
    "gemma3": "gemma3_text:ModelArgs",
    "gemma3n": "gemma3n:TextConfig",
    "gemma4": "gemma4_text:ModelArgs",
    "muse_spark": "muse_spark:TextArgs",
    "kimi_k25": "kimi_k25:TextConfig",
    "kimi_k3": "kimi_k3:TextArgs",
    "kimi_vl": "kimi_vl:TextArgs",
    "lfm2-vl": "lfm2:ModelArgs",
    "llama4": "llama4:TextArgs",
    "minimax_m3_vl": "minimax_m3_vl:TextArgs",
    "mistral3": "ministral3:ModelArgs",
    "pixtral": "llama:ModelArgs",
    "qwen2_vl": "qwen2:ModelArgs",
    "qwen3_5": "qwen3_5:TextModelArgs",
    "qwen3_5_moe": "qwen3_5:TextModelArgs",
    "qwen3_vl": "qwen3:ModelArgs",
    "qwen3_vl_moe": "qwen3_moe:ModelArgs",
}
_KIMI = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 16, "short_conv_kernel_size": 4}
_YARN = {
    "type": "yarn",
    "factor": 2.0,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 1.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
    "original_max_position_embeddings": 128,
}
_LLAMA4_SCALE = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 8, "rope_theta": 10000.0}
_LLAMA4 = {"rope_type": "default", **_LLAMA4_SCALE}
_BLOCK = {
    "attention": {"no_op": False, "replace_with_linear": False, "n_heads_in_group": 2},
    "ffn": {"no_op": False, "replace_with_linear": False, "ffn_mult": 1.5},
}
_BY_LAYER = {name: {"rope_type": "default", "rope_theta": 10000.0} for name in ("sliding_attention", "full_attention")}
_LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16}
OWN_MLX: dict[str, dict[str, Any]] = {
    "baichuan_m1": {"sliding_window_layers": [0, 2]},
    "cohere2": {"sliding_window_pattern": 2},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"rope_scaling": _YARN, "n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v3": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "deepseek_v32": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "gemma3_text": {"sliding_window_pattern": 2},
    "gemma3n": {
        "text_config": {
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
            "altup_active_idx": 0,
            "num_kv_shared_layers": 2,
        }
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba", "attention"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "mamba_d_conv": 4,
        "mamba_n_groups": 1,
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "shared_intermediate_size": 32,
        "position_embedding_type": "rope",
        "rope_theta": 10000.0,
    },
    "hunyuan": {"rope_scaling": {"alpha": 1000.0, "factor": 1.0, "type": "dynamic"}},
    "kimi_k3": {"text_config": {"linear_attn_config": _KIMI, **_LATENT, "moe_intermediate_size": 32, "num_experts": 4}},
    "kimi_linear": {"linear_attn_config": _KIMI, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16},
    "lfm2": {"full_attn_idxs": [1, 3], "block_ff_dim": 96, "block_auto_adjust_ff_dim": True},
    "lfm2_moe": {"full_attn_idxs": [1, 3]},
    "llama4": {"text_config": {"rope_scaling": _LLAMA3, "attn_temperature_tuning": 4, "num_experts_per_tok": 1}},
    "longcat_flash": {"attention_method": "MLA", "zero_expert_type": "identity"},
    "mellum": {"rope_parameters": _BY_LAYER},
    "minicpm3": {
        "rope_scaling": {
            "rope_type": "longrope",
            "original_max_position_embeddings": 128,
            "short_factor": 1.0,
            "long_factor": 1.0,
        }
    },
    "ministral3": {"rope_parameters": _LLAMA4},
    "mistral4": {"rope_parameters": {**_YARN, "rope_type": "yarn", **_LLAMA4_SCALE}},
    "mimo_v2_flash": {"moe_layer_freq": [0, 1, 1, 1]},
    "nemotron-nas": {"block_configs": [_BLOCK] * 4},
    "nemotron_h": {"hybrid_override_pattern": ["M", "*", "M", "-"]},
    "phi3small": {"dense_attention_every_n_layers": 2, "vocab_size": 100352},  # it writes to logits up to that number
    "plamo": {"n_shared_head": 2},
    "qwen3": {"rope_theta": 10000.0},
    "recurrent_gemma": {"block_types": ["recurrent", "recurrent", "attention", "recurrent"]},
    "step3p5": {"moe_num_experts": 4, "moe_top_k": 2},
    "openelm": {
        "ffn_dim_divisor": 32,
        "num_query_heads": [4] * 4,
        "num_kv_heads": [2] * 4,
        "ffn_multipliers": [1.0] * 4,
    },
    "spark2_5": {"rope_parameters": _BY_LAYER},
}

__all__ = ["OWN_MLX", "TEXT_OF", "VALUES"]
