"""Zamba2 keeps its time steps above a smallest one in a prefill, and not in a decode step."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, Zamba2Config

ids = torch.arange(5, 19)[None]
for smallest in (0.001, 0.0):  # the default; none
    torch.manual_seed(0)
    config = Zamba2Config(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=4, layers_block_type=["mamba", "hybrid", "mamba"], n_mamba_heads=8, mamba_headdim=16,
        mamba_d_state=16, mamba_ngroups=1, num_mem_blocks=1, adapter_rank=8, use_mem_rope=True,
        initializer_range=0.2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    for layer in (layer for layer in model.modules() if hasattr(layer, "time_step_limit")):
        layer.time_step_limit = (smallest, float("inf"))
    with torch.no_grad():
        full = model(ids).logits[0, -1]
        cache = DynamicCache(config=config)
        model(ids[:, :-1], past_key_values=cache)
        step = model(ids[:, -1:], past_key_values=cache).logits[0, -1]
    print(f"smallest time step {smallest}: relative error {(step - full).norm() / full.norm():.1e}")
