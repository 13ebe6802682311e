"""A dynamic cache of indexed attention, taken out and put in again, loses the keys of its indexer."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, GlmMoeDsaConfig

torch.manual_seed(0)
config = GlmMoeDsaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=4, n_shared_experts=1, n_routed_experts=4, num_experts_per_tok=2,
    kv_lora_rank=16, q_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, index_topk=8,
    index_head_dim=16, index_n_heads=4, mlp_layer_types=["dense", "dense"],
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 19)[None]
with torch.no_grad():
    full = model(ids).logits[0, -1]
    cache = DynamicCache(config=config)
    model(ids[:, :-1], past_key_values=cache)
    moved = DynamicCache(ddp_cache_data=list(cache), config=config)
    sizes = [0 if keys is None else keys.shape[1] for keys in (c.layers[0].indexer_keys for c in (cache, moved))]
    print("keys of the indexer before and after:", *sizes)
    kept = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
    lost = model(ids[:, -1:], past_key_values=moved).logits[0, -1]
for name, logits in (("kept", kept), ("moved", lost)):
    print(f"relative error with the cache {name}: {(logits - full).norm() / full.norm():.1e}")
