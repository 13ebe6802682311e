"""Decoders with the positions of BART count padding on the left as text, in a forward call and in `generate`."""

import torch
from transformers import BartConfig, BartForCausalLM, OPTConfig, OPTForCausalLM

torch.manual_seed(0)
ids = torch.arange(5, 16)[None]
padded = torch.cat([torch.ones(1, 3, dtype=torch.long), ids], 1)
mask = (torch.arange(padded.shape[1]) >= 3).long()[None]
bart = BartConfig(
    vocab_size=128, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96,
    max_position_embeddings=64, is_decoder=True,
)  # fmt: skip
opt = OPTConfig(
    vocab_size=128, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, word_embed_proj_dim=64,
)  # fmt: skip
for model in (BartForCausalLM(bart), OPTForCausalLM(opt)):
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "embed_positions" in name:
                parameter.normal_()
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        options |= {"pad_token_id": 1, "eos_token_id": None}
        alone, forward = model(ids).logits[0, -1], model(padded, attention_mask=mask).logits[0, -1]
        generated = model.generate(padded, attention_mask=mask, **options).logits[0][0]
    for name, logits in (("forward", forward), ("generate", generated)):
        error = (logits - alone).norm() / alone.norm()
        print(f"relative error of the padded row in {name} of {type(model).__name__}: {error:.1e}")
