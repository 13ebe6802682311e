"""GPT-Neo's local attention on a static cache: the window is counted back from the end of the cache."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GPTNeoConfig, StaticCache

torch.manual_seed(0)
config = GPTNeoConfig(
    vocab_size=128, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96, window_size=4,
    attention_types=[[["global", "local"], 1]], max_position_embeddings=128, initializer_range=0.2,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
ids = torch.arange(5, 17)[None]
with torch.no_grad():
    full = model(ids).logits[0, -1]
    for name, cache in (
        ("dynamic cache", DynamicCache(config=config)),
        ("static cache of 12 slots", StaticCache(config=config, max_cache_len=12)),
        ("static cache of 14 slots", StaticCache(config=config, max_cache_len=14)),
    ):
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
        print(f"{name}: relative error {(step - full).norm() / full.norm():.1e}")
