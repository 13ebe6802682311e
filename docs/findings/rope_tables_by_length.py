"""Rotary tables that depend on the length of the text: on a cache, and left over from a longer call before."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=24, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 35)[None]
with torch.no_grad():
    first = model(ids[:, :24]).logits
    full = model(ids).logits[0, -1]
    again = model(ids[:, :24]).logits
    cache = DynamicCache(config=config)
    for start in range(0, 30, 10):
        step = model(ids[:, start : start + 10], past_key_values=cache).logits[0, -1]
print(f"decode over the switch: relative error {(step - full).norm() / full.norm():.1e}")
print(f"24 tokens before and after a call of 30: relative difference {(again - first).norm() / first.norm():.1e}")
