"""`generate` gives RoBERTa positions from 0 on; its forward call numbers the same text from `padding_idx + 1` on."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, RobertaConfig, RobertaForCausalLM

torch.manual_seed(0)
ids = torch.arange(5, 16)[None]
roberta = RobertaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, is_decoder=True,
)  # fmt: skip
gpt2 = GPT2Config(vocab_size=128, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0)
for model in (RobertaForCausalLM(roberta), GPT2LMHeadModel(gpt2)):
    model.double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" in name or "wpe" in name:
                parameter.normal_()
        forward = model(ids).logits[0, -1]
        options = {"max_new_tokens": 1, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        mask = torch.ones_like(ids)
        generated = model.generate(ids, attention_mask=mask, pad_token_id=1, **options).logits[0][0]
        moved = model(ids, position_ids=torch.arange(ids.shape[1])[None]).logits[0, -1]
    for name, logits in (("with the logits of forward", forward), ("with positions from 0", moved)):
        error = (generated - logits).norm() / logits.norm()
        print(f"relative error of the logits of generate of {type(model).__name__} {name}: {error:.1e}")
