"""Tiny random models of transformers, one for each type of the registry.

Frameworks are imported inside the functions: the list of types is wanted where torch is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from kvdrift.zoo.own import OWN, PARTS, UNSET
from kvdrift.zoo.shrink import shrink

_SEED = 1234
_PEAKED = re.compile(r"\b(q|k|qkv|query|key|Wqkv|c_attn|attn_qkv|query_key_value|W_pack|[qk]_(proj|lin|[ab]_proj))\b")


def registered() -> dict[str, str]:
    """Return the types of causal language models that transformers has registered, with their classes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {kind: str(name) for kind, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()}


def tiny_config(kind: str, **changes: Any) -> Any:
    """Return the default configuration of a type made small, as a decoder, with `changes`."""
    from transformers import AutoConfig

    settings = AutoConfig.for_model(kind).to_dict()
    config = AutoConfig.for_model(kind, **{**small_settings(kind, settings), **changes})
    if kind in PARTS:
        config = getattr(config, PARTS[kind])
        config.num_codebooks = 1  # a token is one number then, as it is for the others
    if hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def small_settings(kind: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a type that are not its defaults: smaller ones, unset ones that must be set, its own."""
    changed = shrink(settings)
    changed |= {name: value for name, value in UNSET.items() if name in settings and settings[name] is None}
    rotated = settings.get("qk_rope_head_dim")
    if rotated is not None and settings.get("head_dim") == rotated:
        changed["head_dim"] = changed.get("qk_rope_head_dim", rotated)  # they are one number
    text = settings.get("text_config")
    if isinstance(text, dict):
        changed["text_config"] = {**text, **small_settings(text["model_type"], text)}
    return changed | OWN.get(kind, {})


def build(kind: str, **changes: Any) -> Any:
    """Return a tiny float32 model of a type, with random weights that are the same each time; nothing is trained.

    `changes` are of its configuration.

    Matrices are scaled up so that attention is peaked and layers matter: with the usual random weights all scores are
    nearly equal, and a wrong key would hardly show.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        if kind in PARTS:
            model: Any = getattr(transformers, registered()[kind])(config)
        else:
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        _enliven(model)
    return model.eval()


def _enliven(model: Any) -> None:
    """Scale the weights of `model` in place."""
    import torch

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.is_floating_point():
                continue
            if parameter.ndim >= 2 and not name.endswith("A_log"):
                if float(parameter.std()) == 0.0:
                    parameter.add_(0.1 * torch.randn_like(parameter))
                elif float(parameter.std()) < 0.1:
                    parameter.mul_(4.0)
                if parameter.ndim == 2 and _PEAKED.search(name):
                    parameter.mul_(3.0)
            elif parameter.ndim == 1:
                parameter.add_(0.25 * torch.randn_like(parameter))
