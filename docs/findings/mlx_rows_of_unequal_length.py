"""mlx-lm: a row of a batch depends on the length of its neighbour, in models whose states do not know the padding."""

import math
from importlib import import_module

import mlx.core as mx
from mlx.utils import tree_flatten
from mlx_lm.generate import BatchGenerator

COMMON = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0}
KINDS = {
    "llama": {**COMMON, **HEADS},
    "mamba": {**COMMON, "state_size": 16, "conv_kernel": 4, "use_bias": False, "use_conv_bias": True,
              "time_step_rank": 8},
    "jamba": {**COMMON, **HEADS, "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1,
              "expert_layer_period": 2, "mamba_d_conv": 4, "mamba_d_state": 16, "mamba_expand": 2, "num_experts": 4,
              "num_experts_per_tok": 2, "max_position_embeddings": 128},
    "recurrent_gemma": {**COMMON, **HEADS, "attention_bias": False, "conv1d_width": 4, "logits_soft_cap": 30.0,
                        "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "baichuan_m1": {**COMMON, **HEADS, "sliding_window": 64, "conv_window": 2, "sliding_window_layers": [0]},
    "mamba2": {**COMMON, "num_heads": 8, "head_dim": 16, "state_size": 16, "intermediate_size": 128,
               "layer_norm_epsilon": 1e-5, "conv_kernel": 4, "n_groups": 1, "use_bias": False, "use_conv_bias": True,
               "tie_word_embeddings": False, "time_step_limit": (0.0, math.inf), "time_step_rank": 8},
}  # fmt: skip
LONG, SHORT = [22, 18, 61, 30, 77, 12, 64, 33, 42, 81, 29, 98, 17], [15, 19, 27, 13, 44]
mx.set_default_device(mx.cpu)


def logprobs(model, *prompts: list[int]) -> list[mx.array]:
    """Log-probabilities behind the first three tokens that are generated for the last of the prompts."""
    generator = BatchGenerator(model, max_tokens=3, stream=mx.new_stream(mx.cpu))
    last = generator.insert([list(prompt) for prompt in prompts])[-1]
    found = []
    while len(found) < 3:
        found += [each.logprobs for each in generator.next_generated() if each.uid == last]
    generator.close()
    return found


for kind, settings in KINDS.items():
    mx.random.seed(0)
    module = import_module(f"mlx_lm.models.{kind}")
    model = module.Model(module.ModelArgs.from_dict({"model_type": kind, **settings}))
    larger = [(name, 3 * w) for name, w in tree_flatten(model.parameters()) if w.ndim > 1 and "A_log" not in name]
    model.load_weights(larger, strict=False)
    alone, beside = logprobs(model, SHORT), logprobs(model, LONG, SHORT)
    errors = [float(mx.abs(mx.exp(b) - mx.exp(a)).sum()) for a, b in zip(alone, beside, strict=True)]
    print(f"{kind}: probabilities of three tokens differ by {', '.join(f'{error:.1e}' for error in errors)}")
