"""GLM in mlx-lm: RoPE turns all of each head, where the configuration says a half of it."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.glm import GLMAttention, ModelArgs
from transformers import GlmConfig

config = GlmConfig()
share = config.rope_parameters["partial_rotary_factor"]
args = ModelArgs(
    model_type="glm", hidden_size=32, num_hidden_layers=1, intermediate_size=64, num_attention_heads=2,
    rms_norm_eps=1e-5, vocab_size=64, head_dim=16, num_key_value_heads=2,
)  # fmt: skip
rng = np.random.default_rng(0)
rows = rng.standard_normal((1, 2, 5, args.head_dim))  # [batch, head, position, dim]


def turned(dims):
    """Neighbouring pairs of the first `dims` elements, turned by position times base^(-2i / dims)."""
    angles = np.arange(rows.shape[2])[:, None] * args.rope_theta ** (-np.arange(0, dims, 2) / dims)
    cos, sin = np.cos(angles), np.sin(angles)
    one, other = rows[..., 0:dims:2], rows[..., 1:dims:2]
    out = rows.copy()
    out[..., 0:dims:2], out[..., 1:dims:2] = one * cos - other * sin, one * sin + other * cos
    return out


with mx.stream(mx.cpu):
    found = np.array(GLMAttention(args).rope(mx.array(rows, dtype=mx.float64)))
print(f"partial_rotary_factor of the configuration: {share}")
for name, dims in (("half of each head", int(share * args.head_dim)), ("all of each head", args.head_dim)):
    exact = turned(dims)
    print(f"{name}: relative error {np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}")
