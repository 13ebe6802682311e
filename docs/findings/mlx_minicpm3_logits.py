"""MiniCPM3 in mlx-lm: logits of a tied head are not divided by what the configuration says."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.minicpm3 import Model, ModelArgs
from transformers import MiniCPM3Config

published = MiniCPM3Config()
args = ModelArgs(
    model_type="minicpm3", hidden_size=64, dim_model_base=16, num_hidden_layers=1, intermediate_size=96,
    num_attention_heads=4, rms_norm_eps=1e-5, vocab_size=64, q_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
    kv_lora_rank=16, scale_depth=1.4, scale_emb=12, max_position_embeddings=128, num_key_value_heads=4,
    rope_theta=10000.0, rope_scaling={"short_factor": 1.0, "long_factor": 1.0},
    tie_word_embeddings=True,
)  # fmt: skip
tokens = mx.array([[5, 9, 17, 3, 44]])
with mx.stream(mx.cpu):
    model = Model(args)
    model.set_dtype(mx.float64)
    hidden = np.array(model.model(tokens))
    found = np.array(model(tokens))
table = np.array(model.model.embed_tokens.weight)
right = (hidden / (args.hidden_size / args.dim_model_base)) @ table.T
print(f"tie_word_embeddings by default: {published.tie_word_embeddings}")
print(f"logits over those of hidden states that are divided: {np.linalg.norm(found) / np.linalg.norm(right):.4f}")
ratio = published.hidden_size / published.dim_model_base
print(f"hidden_size / dim_model_base: {args.hidden_size / args.dim_model_base:g} here, {ratio:g} as published")
