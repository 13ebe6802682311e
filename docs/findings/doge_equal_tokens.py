"""Doge keeps a number of keys for each query: among equal tokens other ones in a decode step than in prefill."""

import torch
from transformers import DogeConfig, DogeForCausalLM, DynamicCache

torch.manual_seed(0)
config = DogeConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, keep_window_size=8,
)  # fmt: skip
model = DogeForCausalLM(config).double().eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("q_proj" in name or "k_proj" in name):
            parameter *= 20.0  # attention that is not flat
        if name.endswith(".A"):
            parameter += torch.randn_like(parameter)
different = torch.randperm(100, generator=torch.Generator().manual_seed(1))[None, :64] + 10
repeated = different[:, :16].repeat(1, 4)


def error_of_a_step(ids: torch.Tensor) -> float:
    """Return the largest relative error of the logits of 16 decode steps."""
    full, cache = model(ids).logits[0], DynamicCache(config=config)
    model(ids[:, :48], past_key_values=cache)
    errors = []
    for position in range(48, 64):
        step = model(ids[:, position : position + 1], past_key_values=cache).logits[0, -1]
        errors.append(float((step - full[position]).norm() / full[position].norm()))
    return max(errors)


with torch.no_grad():
    for name, ids in (("64 different tokens", different), ("16 tokens four times", repeated)):
        print(f"relative error of decode steps, {name}: {error_of_a_step(ids):.1e}")
