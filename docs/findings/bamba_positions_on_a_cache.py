"""Bamba without explicit positions: on a filled cache every new token is encoded at position 0."""

import torch
from transformers import AutoModelForCausalLM, BambaConfig, DynamicCache

torch.manual_seed(0)
config = BambaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=16, mamba_d_state=16,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 19)[None]
with torch.no_grad():
    full = model(ids).logits[0, -1]
    for name, extra in (("none given", {}), ("given", {"position_ids": torch.tensor([[13]])})):
        cache = DynamicCache(config=config)
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache, **extra).logits[0, -1]
        print(f"positions {name}: relative error {(step - full).norm() / full.norm():.1e}")
