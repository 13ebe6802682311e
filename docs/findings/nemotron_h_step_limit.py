"""Nemotron-H: prefill clamps the time step of its recurrence from below, a decode step does not."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, NemotronHConfig

torch.manual_seed(0)
config = NemotronHConfig(
    vocab_size=128, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    layers_block_type=["linear_attention", "full_attention", "mlp"], mamba_num_heads=8, mamba_head_dim=16,
    ssm_state_size=16, n_groups=1, expand=2,
)  # fmt: skip
model = AutoModelForCausalLM.from_config(config, dtype=torch.float64).eval()
mixer = model.model.layers[0].mixer
mixer.in_proj.weight.data *= 16.0  # time steps spread as in a trained model
ids = torch.arange(5, 19)[None]
for name, limit in (("as shipped", mixer.time_step_limit), ("without the limit", (0.0, float("inf")))):
    mixer.time_step_limit = limit
    states = []
    with torch.no_grad():
        for n_prompt in (14, 8):
            cache = DynamicCache(config=config)
            model(ids[:, :n_prompt], past_key_values=cache)
            for token in ids[0, n_prompt:]:
                model(token[None, None], past_key_values=cache)
            states.append(next(iter(cache.layers[0].recurrent_states.values())))
    print(f"{name}: relative error of the state {(states[1] - states[0]).norm() / states[0].norm():.1e}")
