"""Falcon with ALiBi cannot run on a static cache: its biases are as long as the text, and the keys as the cache."""

import torch
from transformers import AutoModelForCausalLM, FalconConfig

torch.manual_seed(0)
config = FalconConfig(
    vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, alibi=True, multi_query=False,
    new_decoder_architecture=False, bos_token_id=1, eos_token_id=None,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
ids = torch.arange(5, 16)[None]
for kind in ("dynamic", "static"):
    try:
        model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation=kind)
        print(f"{kind}: runs")
    except (RuntimeError, ValueError) as error:
        print(f"{kind}: {type(error).__name__}: {error}")
