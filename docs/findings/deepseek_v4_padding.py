"""DeepSeek-V4 compresses tokens by their slot, so that padding moves the borders of what is compressed."""

import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config

torch.manual_seed(0)
config = DeepseekV4Config(
    vocab_size=128, hidden_size=64, moe_intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_groups=2, o_lora_rank=16, num_experts_per_tok=2,
    n_routed_experts=4, n_shared_experts=1, sliding_window=8, index_topk=8, index_head_dim=16, index_n_heads=4,
    layer_types=["heavily_compressed_attention", "compressed_sparse_attention"], mlp_layer_types=["hash_moe", "moe"],
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
model.set_experts_implementation("eager")
ids = torch.arange(5, 17)[None]
with torch.no_grad():
    alone = model(ids).logits[0]
    for n_padding in (3, 4):
        padded = torch.cat([torch.zeros(1, n_padding, dtype=torch.long), ids], 1)
        mask = (torch.arange(padded.shape[1]) >= n_padding).long()[None]
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(padded, attention_mask=mask, position_ids=positions).logits[0, n_padding:]
        errors = (logits - alone).norm(dim=-1) / alone.norm(dim=-1)
        print(f"relative errors with {n_padding} tokens of padding:", *(f"{error:.0e}" for error in errors.tolist()))
