"""Mamba 2 in mlx-lm: the gated norm runs over all groups together, where the model's runs over each."""

import mlx.core as mx
import numpy as np
from mlx_lm.models.mamba2 import MambaRMSNormGated
from transformers import Mamba2Config
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

config = Mamba2Config(hidden_size=16, num_heads=4, head_dim=8, n_groups=2, state_size=8, num_hidden_layers=1)
size = Mamba2Mixer(config, layer_idx=0).norm.group_size
rng = np.random.default_rng(0)
rows, gate = rng.standard_normal((2, 1, 5, 32)) * np.repeat([1.0, 3.0], 16)


def normed(of_a_group: int) -> np.ndarray:
    """The gated rows over the root of their mean square, by groups of so many elements."""
    gated = (rows * gate / (1 + np.exp(-gate))).reshape(*rows.shape[:-1], -1, of_a_group)
    return (gated / np.sqrt((gated**2).mean(-1, keepdims=True) + 1e-5)).reshape(rows.shape)


norm = MambaRMSNormGated(32, eps=1e-5)
with mx.stream(mx.cpu):
    found = np.array(norm(mx.array(rows, dtype=mx.float64), mx.array(gate, dtype=mx.float64)))
print(f"elements of a group in transformers, of a state of 32 in {config.n_groups} groups: {size}")
for name, n in (("by groups of 16", 16), ("all 32 together", 32)):
    exact = normed(n)
    print(f"{name}: relative error {np.linalg.norm(found - exact) / np.linalg.norm(exact):.1e}")
