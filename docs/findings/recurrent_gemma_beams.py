"""RecurrentGemma in beam search: its states stay where they were when beams change places."""

import torch
from transformers import AutoModelForCausalLM, GenerationConfig, RecurrentGemmaConfig

torch.manual_seed(1234)
config = RecurrentGemmaConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, head_dim=16,
    num_key_value_heads=2, lru_width=64, attention_window_size=64, block_types=["recurrent", "recurrent", "attention"],
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
for parameter in model.parameters():  # the default initialisation leaves every layer close to the identity
    parameter.data.mul_(4.0 if parameter.ndim >= 2 else 1.0)
model.generation_config = GenerationConfig()  # no token ends a text
ids = torch.tensor([[5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]])
for n_beams in (1, 3):
    out = model.generate(
        ids, max_new_tokens=5, num_beams=n_beams, num_return_sequences=n_beams, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    for row, tokens in enumerate(out.sequences):
        with torch.no_grad():
            logits = model(tokens[None], use_cache=False).logits[0]
        full = logits.log_softmax(-1)[10:15].gather(1, tokens[11:, None]).sum()
        path = out.beam_indices[row : row + 1] if n_beams > 1 else None
        found = out.sequences[row : row + 1], out.scores, path
        taken = model.compute_transition_scores(*found, normalize_logits=n_beams == 1)
        print(f"{n_beams} beams, row {row}: log-probability {taken.sum():.4f} in generate, {full:.4f} in a full pass")
