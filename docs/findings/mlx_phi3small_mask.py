"""Phi-3-small of mlx-lm adds its mask to the scores of block-sparse layers as truth values, which hides nothing."""

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache
from mlx_lm.models.phi3small import Model, ModelArgs

mx.set_default_device(mx.cpu)
mx.random.seed(0)
ids = [5, 9, 17, 3, 22, 41, 7, 11, 30, 2, 8, 14]


def logits(model: Model, cut: int) -> np.ndarray:
    """Logits of the first tokens, whose last are fed one by one behind the first `cut`."""
    cache = [KVCache() for _ in model.layers]
    rows = [model(mx.array([ids[:cut]]), cache=cache)[0, :, :100]]
    rows += [model(mx.array([[token]]), cache=cache)[0, :, :100] for token in ids[cut:]]
    return np.asarray(mx.concatenate(rows).tolist())


for name, every in (("block-sparse and dense layers", 2), ("dense layers alone", 1)):
    model = Model(
        ModelArgs(
            model_type="phi3small", hidden_size=64, dense_attention_every_n_layers=2, ff_intermediate_size=96,
            gegelu_limit=20.0, num_hidden_layers=2, num_attention_heads=4, layer_norm_epsilon=1e-5,
            vocab_size=100352, num_key_value_heads=2,
        )
    )  # fmt: skip
    model.update(tree_map(lambda value: value.astype(mx.float64), model.parameters()))
    if every == 1:
        for layer in model.layers:
            layer.self_attn.block_sparse = False
    whole, one_by_one = logits(model, len(ids)), logits(model, 1)
    apart = np.linalg.norm(whole - one_by_one) / np.linalg.norm(whole)
    print(f"{name}: prefill and one by one differ by {apart:.1e}")
