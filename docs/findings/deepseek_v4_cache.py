"""The cache layers of DeepSeek-V4 keep compressed rows, and a crop, a choice of rows and a move leave them out."""

import torch
from transformers import AutoModelForCausalLM, DeepseekV4Config, DynamicCache, StaticCache

torch.manual_seed(0)
config = DeepseekV4Config(
    vocab_size=128, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
    num_attention_heads=4, num_key_value_heads=1, head_dim=16, q_lora_rank=16, o_lora_rank=16, o_groups=2,
    n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, sliding_window=8, index_topk=8, index_head_dim=16,
    index_n_heads=16, qk_rope_head_dim=8, partial_rotary_factor=0.5, num_hash_layers=0,
    layer_types=["compressed_sparse_attention", "heavily_compressed_attention"],
    compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 8},
)  # fmt: skip
model = AutoModelForCausalLM.from_config(
    config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float64
).eval()
ids = torch.arange(5, 25)[None]


def filled(rows: torch.Tensor) -> DynamicCache:
    """A cache that holds all tokens of `rows` but the last."""
    cache = DynamicCache(config=config)
    model(rows[:, :-1], past_key_values=cache)
    return cache


def step(name: str, cache: DynamicCache, rows: torch.Tensor) -> None:
    """Print what the next step says: how far its logits are off, or the error that it raises."""
    right = model(rows).logits[:, -1]
    try:
        found = model(rows[:, -1:], past_key_values=cache).logits[:, -1]
    except RuntimeError as error:
        print(f"{name}: {type(error).__name__}: {str(error).splitlines()[0][:90]}")
    else:
        print(f"{name}: relative error of the logits {(found - right).norm() / right.norm():.1e}")


with torch.no_grad():
    step("kept", filled(ids), ids)
    step("moved", DynamicCache(ddp_cache_data=list(filled(ids)), config=config), ids)
    three = torch.cat([ids, ids + 20, ids + 40])
    cache = filled(three)
    cache.batch_select_indices(torch.tensor([0, 2]))
    step("rows selected", cache, three[[0, 2]])
    cache = filled(ids)
    cache.activate_past_recording()
    model(torch.tensor([[99, 98]]), past_key_values=cache)
    cache.crop(-3)
    step("cropped", cache, ids[:, :-1])
    try:
        StaticCache(config=config, max_cache_len=32)
    except KeyError as error:
        print(f"static: KeyError: {error}")
