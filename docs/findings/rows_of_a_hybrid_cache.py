"""A row of a batch ends: a hybrid cache keeps the keys of the other rows, and the states of all of them."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, FalconH1Config

torch.manual_seed(0)
config = FalconH1Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, mamba_d_ssm=128, mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
    mamba_n_groups=1,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 26).reshape(3, 7)
cache = DynamicCache(config=config)
with torch.no_grad():
    model(ids[:, :-1], past_key_values=cache)
    cache.batch_select_indices(torch.tensor([0, 2]))
    layer = cache.layers[0]
    print(f"rows kept: 2, of the keys: {len(layer.keys)}, of the recurrent state: {len(layer.recurrent_states[0])}")
    try:
        model(ids[[0, 2], -1:], past_key_values=cache)
    except RuntimeError as error:
        print(f"the next step: {type(error).__name__}: {str(error).splitlines()[0]}")
