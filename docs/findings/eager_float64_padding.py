"""Eager attention of a float64 model with a padded row: the softmax is taken in float32, which cannot hold the mask."""

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0,
)  # fmt: skip
ids = torch.tensor([[5, 9, 17, 3, 44], [0, 0, 5, 9, 17]])
mask = (ids != 0).long()
positions = (mask.cumsum(1) - 1).clamp(min=0)
for attention in ("eager", "sdpa"):
    for dtype in (torch.float32, torch.float64):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype).eval()
        with torch.no_grad():
            padded = model(ids, attention_mask=mask, position_ids=positions).logits[1, -1]
            alone = model(ids[1:, 2:]).logits[0, -1]
        n_nan = int(padded.isnan().sum())
        error = ((padded - alone).norm() / alone.norm()).item()
        print(f"{attention}, {dtype}: {n_nan} of {padded.numel()} logits are NaN, relative error {error:.1e}")
