"""Llama 4's text model in mlx-lm: queries and keys are normed in layers that turn nothing as well."""

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.llama4_text import Attention, ModelArgs
from transformers import Llama4TextConfig
from transformers.models.llama4.modeling_llama4 import Llama4TextAttention

config = Llama4TextConfig(
    hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_hidden_layers=2,
    no_rope_layers=[1, 0], use_qk_norm=True, attn_implementation="eager",
)  # fmt: skip
args = ModelArgs(
    model_type="llama4_text", hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=64,
    intermediate_size=96, intermediate_size_mlp=96, num_key_value_heads=2, rms_norm_eps=config.rms_norm_eps,
    rope_theta=10000.0, head_dim=16, tie_word_embeddings=True, no_rope_layers=[1, 0], use_qk_norm=True,
)  # fmt: skip
rng = np.random.default_rng(0)
x = rng.standard_normal((1, 5, 64))
size = {"q_proj": (64, 64), "k_proj": (32, 64), "v_proj": (32, 64), "o_proj": (64, 64)}
weights = {name: rng.standard_normal(shape) / 4.0 for name, shape in size.items()}

theirs = Llama4TextAttention(config, layer_idx=1).double()
theirs.load_state_dict({f"{name}.weight": torch.from_numpy(weight) for name, weight in weights.items()})
hidden = torch.full((5, 5), -torch.inf, dtype=torch.float64).triu(1)[None, None]
with torch.no_grad():
    right = theirs(torch.from_numpy(x), None, hidden)[0].numpy()


def attention(normed):
    """The same by hand; `normed` is what becomes of queries and keys."""
    q, k, v = (
        (x @ weights[name].T).reshape(1, 5, -1, 16).transpose(0, 2, 1, 3) for name in ("q_proj", "k_proj", "v_proj")
    )
    q, k, v = normed(q), normed(k).repeat(2, axis=1), v.repeat(2, axis=1)
    scores = q @ k.swapaxes(-1, -2) / 4.0 + hidden.numpy()
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    return (weight / weight.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3).reshape(1, 5, 64) @ weights["o_proj"].T


plain = attention(lambda rows: rows)
norm = attention(lambda rows: rows / np.sqrt((rows**2).mean(-1, keepdims=True) + config.rms_norm_eps))
with mx.stream(mx.cpu):
    ours = Attention(args, use_rope=args.no_rope_layers[1])
    ours.load_weights([(f"{name}.weight", mx.array(weight, dtype=mx.float64)) for name, weight in weights.items()])
    found = np.array(ours(mx.array(x, dtype=mx.float64), mask=mx.array(hidden.numpy(), dtype=mx.float64)))
for name, exact in (("without a norm", plain), ("with a norm", norm)):
    apart = [np.linalg.norm(each - exact) / np.linalg.norm(exact) for each in (right, found)]
    print(f"layer that turns nothing, {name}: transformers is {apart[0]:.1e} away, mlx-lm {apart[1]:.1e}")
