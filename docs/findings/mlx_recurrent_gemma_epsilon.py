"""RecurrentGemma in mlx-lm: the norms of its blocks have an epsilon of their own, and not that of the configuration."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.recurrent_gemma import ResidualBlock

CONFIGURED = 1e-6  # rms_norm_eps of the published models
WIDTH = 32
rng = np.random.default_rng(0)
with mx.stream(mx.cpu):
    block = ResidualBlock(
        width=WIDTH, mlp_expanded_width=64, num_heads=4, attention_window_size=8, temporal_block_type="recurrent",
        lru_width=WIDTH,
    )  # fmt: skip
    x = 0.1 * rng.standard_normal((1, WIDTH))
    norm = block.temporal_pre_norm
    norm.weight = mx.zeros((WIDTH,), dtype=mx.float64)
    found = np.array(norm(mx.array(x, dtype=mx.float64)))
    for epsilon in (CONFIGURED, 1e-5):
        exact = x / np.sqrt(np.mean(x**2) + epsilon)
        print(f"epsilon {epsilon:.0e}: relative error {np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}")
