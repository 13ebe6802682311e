"""ProphetNet as a decoder: its logits at a token are others when tokens follow, and others again in a decode step."""

import torch
from transformers import DynamicCache, ProphetNetConfig, ProphetNetForCausalLM

torch.manual_seed(0)
config = ProphetNetConfig(
    vocab_size=128, hidden_size=64, num_decoder_layers=2, num_decoder_attention_heads=4, decoder_ffn_dim=96,
    max_position_embeddings=128, is_decoder=True, add_cross_attention=False, init_std=0.2,
)  # fmt: skip
model = ProphetNetForCausalLM(config).double().eval()
ids = torch.arange(5, 17)[None]
with torch.no_grad():
    whole, alone = model(ids).logits[0, 9], model(ids[:, :10]).logits[0, 9]
    cache = DynamicCache(config=config)
    model(ids[:, :9], past_key_values=cache, use_cache=True)
    step = model(ids[:, 9:10], past_key_values=cache, use_cache=True).logits[0, 0]
print(f"token 9 with and without two tokens behind it: relative difference {(whole - alone).norm() / alone.norm():.1e}")
print(f"token 9 in a decode step and in a prefill that ends with it: {(step - alone).norm() / alone.norm():.1e}")
