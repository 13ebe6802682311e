"""Small models in the forms in which people have them: adapters, wrappers, heads, masks and caches of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

torch.set_num_threads(1)

SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
PROMPTS = {"a": [5, 9, 17, 3, 44, 2, 8, 61, 30], "b": [7, 12, 70]}


def lively(kind: type = LlamaForCausalLM, config: Any = None, dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return a random model whose attention is peaked."""
    torch.manual_seed(0)
    model = kind(config or LlamaConfig(**SMALL))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("q_proj" in name or "k_proj" in name) and parameter.ndim == 2:
                parameter.mul_(4.0)
    return model.to(dtype).eval()


def with_lora(**options: Any) -> Any:
    """Return the lively model with a LoRA adapter in its attention, whose weights are not zero."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "v_proj", "o_proj"]
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM", **options)
    torch.manual_seed(1)
    return get_peft_model(lively(), config)


class Wrapper(nn.Module):
    """Holds a model as `module`, as the data-parallel wrappers do."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.module = model

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class ValueHead(nn.Module):
    """Holds a model and a head that values its states, and has the model's config; returns a tuple, logits first."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = model
        self.config = model.config
        self.v_head = nn.Linear(SMALL["hidden_size"], 1).to(model.dtype)

    def forward(self, input_ids: Any = None, past_key_values: Any = None, **kwargs: Any) -> Any:
        out = self.pretrained_model(
            input_ids=input_ids, past_key_values=past_key_values, output_hidden_states=True, **kwargs
        )
        return out.logits.float(), None, self.v_head(out.hidden_states[-1]).squeeze(-1)

    def can_generate(self) -> bool:
        return True

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        return self.pretrained_model.generate(*args, **kwargs)


class TupleCache(LlamaForCausalLM):  # type: ignore[misc]  # transformers has no types
    """Keeps its cache as one (key, value) for each layer."""

    def forward(self, input_ids: Any = None, past_key_values: Any = None, use_cache: bool = True, **kwargs: Any) -> Any:
        cache = DynamicCache()
        for layer, (key, value) in enumerate(past_key_values[i] for i in range(2 if past_key_values else 0)):
            cache.update(key, value, layer)
        out = super().forward(input_ids, past_key_values=cache, use_cache=True, **kwargs)
        out.past_key_values = tuple((layer.keys, layer.values) for layer in cache.layers)
        return out


class TupleOutput(LlamaForCausalLM):  # type: ignore[misc]
    """Returns a plain tuple, the cache before the logits."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        return out.past_key_values, out.logits
