"""Tiny random models of real architectures, so that the corpus can be run in minutes and without any download.

Query and key weights are scaled up, since nearly uniform attention would hide faults of position and of mapping;
biases, sinks and norm weights are random, since a model whose biases are zero does not notice that one is lost.
"""

from __future__ import annotations

from typing import Any

import torch

from kvdrift.errors import UsageError

PREFIX = "tiny:"
_SEED = 1234

_SIZE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_GROUPED = {**_SIZE, "num_key_value_heads": 2}
_OLD_SIZE = {"vocab_size": 128, "n_layer": 3, "n_head": 4}
_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

# Model type of transformers and its options, by name.
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", _GROUPED),
    "qwen3": ("qwen3", {**_GROUPED, "head_dim": 16}),
    "gemma2": (
        "gemma2",
        {**_GROUPED, "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 5.0, "query_pre_attn_scalar": 16},
    ),
    "gpt2": ("gpt2", {**_OLD_SIZE, "n_embd": 64, "n_positions": 128}),
    "bloom": ("bloom", {**_OLD_SIZE, "hidden_size": 64}),
    "phi3": ("phi3", {**_GROUPED, "pad_token_id": 0}),
    "mixtral": ("mixtral", {**_GROUPED, **_EXPERTS}),
    "gpt_oss": (
        "gpt_oss",
        {
            **_GROUPED,
            **_EXPERTS,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "mamba2": (
        "mamba2",
        {
            "vocab_size": 128,
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_heads": 8,
            "head_dim": 16,
            "state_size": 16,
            "n_groups": 1,
            "expand": 2,
        },
    ),
}
_EAGER_ONLY = frozenset({"gpt_oss", "gemma2", "bloom", "mamba2"})
_PEAKED = ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv_proj")


def attends(spec: str, attention: str) -> bool:
    """Whether the model that `spec` names has this attention implementation, as far as this module knows."""
    return attention == "eager" or spec.removeprefix(PREFIX) not in _EAGER_ONLY or not spec.startswith(PREFIX)


def tiny_model(name: str, dtype: torch.dtype, attention: str) -> Any:
    """Return the tiny model `name`, the same weights each time.

    Raises:
        UsageError: there is no such model, or it cannot attend in this way.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if name not in TINY:
        raise UsageError(f"there is no tiny model {name!r}; known: {', '.join(TINY)}")
    if not attends(f"{PREFIX}{name}", attention):
        raise UsageError(f"{PREFIX}{name} attends in eager mode only; use --attn eager")
    model_type, options = TINY[name]
    if name in ("mixtral", "gpt_oss"):
        options = {**options, "experts_implementation": "eager"}
    config = AutoConfig.for_model(model_type, **options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if parameter.ndim == 1:
                    parameter.add_(0.25 * torch.randn_like(parameter))
                else:
                    is_peaked = parameter.ndim == 2 and any(part in parameter_name for part in _PEAKED)
                    parameter.mul_(12.0 if is_peaked else 4.0)
    # A model that was loaded keeps its RoPE frequencies in float32 whatever its dtype.
    tables = [(m, key, m._buffers[key]) for m in model.modules() for key in m._buffers if key.endswith("inv_freq")]
    model = model.to(dtype)
    for module, key, table in tables:
        setattr(module, key, table)
    return model.eval()
