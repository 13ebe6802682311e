"""A dynamic cache with sliding layers, taken out and put in again, forgets how many tokens it has seen."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Gemma2Config

torch.manual_seed(0)
config = Gemma2Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, sliding_window=8,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 19)[None]
with torch.no_grad():
    full = model(ids).logits[0, -1]
    cache = DynamicCache(config=config)
    model(ids[:, :-1], past_key_values=cache)
    moved = DynamicCache(ddp_cache_data=list(cache), config=config)
    print("length before and after:", cache.get_seq_length(), moved.get_seq_length())
    kept = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
    lost = model(ids[:, -1:], past_key_values=moved).logits[0, -1]
for name, logits in (("kept", kept), ("moved", lost)):
    print(f"relative error with the cache {name}: {(logits - full).norm() / full.norm():.1e}")
