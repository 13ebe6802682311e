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
    (r"conv_window|mamba_expand|cla_share_factor|expert_layer_period|attn_layer_period|layer_group_size", 2),
    (r"attn_layer_offset|expert_layer_offset|decoder_sparse_step|moe_layer_freq", 1),
    (r"group_norm_size|num_shared_expert", 1),
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
OWN_MLX: dict[str, dict[str, Any]] = {}

__all__ = ["OWN_MLX", "TEXT_OF", "VALUES"]
