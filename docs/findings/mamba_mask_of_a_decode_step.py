"""Mamba given the padding mask of the whole text with a single token on a filled state."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, MambaConfig

torch.manual_seed(0)
config = MambaConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, state_size=16, time_step_rank=8)
model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
ids = torch.arange(5, 17)[None]
rows = torch.cat([ids, torch.cat([torch.zeros(1, 9, dtype=torch.long), ids[:, :3]], dim=1)])
mask = torch.ones_like(rows)
mask[1, :9] = 0
with torch.no_grad():
    alone = [model(ids).logits[0, -1], model(ids[:, :3]).logits[0, -1]]
    for name, steps_have_mask in (("no mask in steps", False), ("the mask of all tokens in steps", True)):
        cache = DynamicCache(config=config)
        for start, stop in ((0, 10), (10, 11), (11, 12)):
            given = mask[:, :stop] if start == 0 or steps_have_mask else None
            logits = model(rows[:, start:stop], cache_params=cache, attention_mask=given, use_cache=True).logits
        norms = [((step[-1] - row).norm() / row.norm()).item() for step, row in zip(logits, alone, strict=True)]
        print(f"{name}: relative errors of the two rows {norms[0]:.1e}, {norms[1]:.1e}")
    print(f"convolution state after the last step: {tuple(cache.layers[0].conv_states[0].shape)}")
