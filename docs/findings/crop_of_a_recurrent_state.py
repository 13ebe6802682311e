"""Two drafts are fed and taken back: the keys go, the recurrent state keeps what the drafts did to it."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3NextConfig

torch.manual_seed(0)
config = Qwen3NextConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=16,
    linear_value_head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
    shared_expert_intermediate_size=32, layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
model.set_experts_implementation("eager")
ids = torch.arange(5, 26)[None]
with torch.no_grad():
    wanted = model(ids, use_cache=False).logits[0, -1]
    cache = DynamicCache(config=config)
    model(ids[:, :-1], past_key_values=cache)
    before = cache.layers[0].recurrent_states[0].clone()
    cache.activate_past_recording()
    model(torch.tensor([[100, 101]]), past_key_values=cache)
    cache.crop(-2)
    held, after = cache.get_seq_length(), cache.layers[0].recurrent_states[0]
    found = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
moved = (after - before).norm() / before.norm()
print(f"keys after crop(-2): {held}, as before; the recurrent state differs by {moved:.1e}")
print(f"logits of the next token: {(found - wanted).norm() / wanted.norm():.1e} off")
