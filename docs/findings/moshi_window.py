"""Moshi: prefill attends to all tokens, while the cache keeps the last `sliding_window` of them."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

torch.manual_seed(0)
config = AutoConfig.for_model(
    "moshi", vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, sliding_window=8,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 25)[None]
with torch.no_grad():
    for length in (8, 12, 20):
        full = model(ids[:, :length]).logits[0, -1]
        cache = DynamicCache(config=config)
        model(ids[:, : length - 1], past_key_values=cache)
        step = model(ids[:, length - 1 : length], past_key_values=cache).logits[0, -1]
        print(f"{length} tokens: relative error {(step - full).norm() / full.norm():.1e}")
