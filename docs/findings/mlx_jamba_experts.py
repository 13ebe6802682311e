"""Jamba in mlx-lm: experts are weighed by a softmax over the chosen ones, where the model's is over all of them."""

import mlx.core as mx
import numpy as np
import torch
from mlx_lm.models.jamba import JambaSparseMoeBlock, ModelArgs
from transformers import JambaConfig
from transformers.models.jamba.modeling_jamba import JambaTopKRouter

config = JambaConfig(hidden_size=16, num_experts=4, num_experts_per_tok=2)
args = ModelArgs(
    model_type="jamba", hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=2, attn_layer_offset=1, attn_layer_period=2, expert_layer_offset=1, expert_layer_period=2,
    mamba_d_conv=4, mamba_d_state=8, mamba_expand=2, num_experts=4, num_experts_per_tok=2, rms_norm_eps=1e-6,
    max_position_embeddings=64, vocab_size=64,
)  # fmt: skip
rng = np.random.default_rng(0)
rows, weight = rng.standard_normal((1, 5, 16)), rng.standard_normal((4, 16))

router = JambaTopKRouter(config).double()
router.weight.data = torch.tensor(weight)
_, theirs, _ = router(torch.tensor(rows[0]))

mx.set_default_device(mx.cpu)
block = JambaSparseMoeBlock(args)
block.router.weight = mx.array(weight, dtype=mx.float64)
block.switch_mlp = lambda x, chosen: mx.ones((*chosen.shape, 16), dtype=mx.float64)  # each expert gives ones
sums = np.array(block(mx.array(rows, dtype=mx.float64)))[0, :, 0]  # so that the sum of the weights comes out

logits = rows[0] @ weight.T
whole = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
print("sum of the weights of the chosen experts, token by token")
for name, values in (
    ("softmax over all", np.sort(whole)[:, -2:].sum(-1)),
    ("transformers", theirs.sum(-1).detach().numpy()),
    ("mlx-lm", sums),
):
    print(f"{name}: {', '.join(f'{value:.3f}' for value in values)}")
