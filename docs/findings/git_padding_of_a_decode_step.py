"""GIT without an image widens the mask of a decode step by the tokens of an image that is not in its cache."""

import torch
from transformers import DynamicCache, GitConfig, GitForCausalLM

torch.manual_seed(0)
vision = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 224,
    "patch_size": 16,
}  # fmt: skip
config = GitConfig(
    vision_config=vision, vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
    num_attention_heads=4, max_position_embeddings=128,
)  # fmt: skip
model = GitForCausalLM(config).double().eval()
with torch.no_grad():
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and ("query" in name or "key" in name):
            parameter *= 20.0  # attention that is not flat
ids = torch.arange(5, 16)[None]
padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
positions = (mask.cumsum(-1) - 1).clamp(min=0)
with torch.no_grad():
    alone = model(ids).logits[0, -1]
    prefill = model(padded, attention_mask=mask, position_ids=positions).logits[0, -1]
    cache = DynamicCache(config=config)
    model(padded[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], past_key_values=cache)
    step = model(padded[:, -1:], attention_mask=mask, position_ids=positions[:, -1:], past_key_values=cache).logits[
        0, -1
    ]
for name, logits in (("prefill of the padded row", prefill), ("decode step of the padded row", step)):
    print(f"relative error of a {name}: {(logits - alone).norm() / alone.norm():.1e}")
