"""Jamba, Mamba and Falcon Mamba fed several tokens on a filled state: the recurrent state before them is not used."""

import torch
from transformers import AutoModelForCausalLM, DynamicCache, FalconMambaConfig, JambaConfig, MambaConfig

_JAMBA = {
    "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts": 1, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 16,
    "mamba_dt_rank": 8,
}  # fmt: skip
_MAMBA = {"vocab_size": 128, "hidden_size": 64, "num_hidden_layers": 2, "state_size": 16, "time_step_rank": 8}
ids = torch.arange(5, 19)[None]


@torch.no_grad()
def show(config, argument):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float64).eval()
    full = model(ids).logits[0, -2:]
    for name, calls, is_emptied in (
        ("one by one", (1, 1), False),
        ("two at once", (2,), False),
        ("two at once, the state set to zero before", (2,), True),
    ):
        cache = DynamicCache(config=config)
        model(ids[:, :-2], use_cache=True, **{argument: cache})
        if is_emptied:
            cache.layers[0].recurrent_states[0].zero_()
        fed, rows = ids.shape[1] - 2, []
        for n_tokens in calls:
            rows.append(model(ids[:, fed : fed + n_tokens], use_cache=True, **{argument: cache}).logits[0])
            fed += n_tokens
        step = torch.cat(rows)
        print(f"{config.model_type}, {name}: relative error {(step - full).norm() / full.norm():.6e}")


show(JambaConfig(**_JAMBA), "past_key_values")
show(MambaConfig(**_MAMBA), "cache_params")
show(FalconMambaConfig(**_MAMBA), "cache_params")
