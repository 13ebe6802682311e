"""Tiny random models of real architectures, so that the corpus can be run in minutes and without any download.

Query and key weights are scaled up, since nearly uniform attention would hide faults of position and of mapping.
"""

from __future__ import annotations

from typing import Any

import torch

from kvdrift.errors import UsageError
from kvdrift_bench.models.architectures import ARCHITECTURES
from kvdrift_bench.run.options import TINY

_SEED = 1234

_EAGER_ONLY = frozenset({"gpt_oss", "gemma2", "bloom", "mamba", "mamba2", "gemma3n"})
# Their other implementations of experts do not run in float64 on a CPU.
_EAGER_EXPERTS = frozenset({"mixtral", "gpt_oss"})
_PEAKED = ("q_proj", "k_proj", "c_attn", "query_key_value", "qkv_proj")


def attends(spec: str, attention: str) -> bool:
    """Whether the model that `spec` names has this attention implementation, as far as this module knows."""
    return attention == "eager" or spec.removeprefix(TINY) not in _EAGER_ONLY or not spec.startswith(TINY)


def tiny_model(name: str, dtype: torch.dtype, attention: str) -> Any:
    """Return the tiny model `name`, the same weights each time, and lively as `build_tiny` says.

    Raises:
        UsageError: there is no such model, or it cannot attend in this way.
    """
    if name not in ARCHITECTURES:
        raise UsageError(f"there is no tiny model {name!r}; known: {', '.join(ARCHITECTURES)}")
    if not attends(f"{TINY}{name}", attention):
        raise UsageError(f"{TINY}{name} attends in eager mode only; use --attn eager")
    return lively_model(name, dtype, attention)


def lively_model(name: str, dtype: torch.dtype, attention: str | None = None, **options: Any) -> Any:
    """Return a tiny model in which nothing is zero or one by initialisation, with experts that run at every dtype."""
    if name in _EAGER_EXPERTS:
        options = {"experts_implementation": "eager", **options}
    return build_tiny(name, dtype=dtype, attention=attention, lively=True, **options)


def build_tiny(
    name: str,
    *,
    dtype: torch.dtype = torch.float32,
    attention: str | None = None,
    lively: bool = False,
    **options: Any,
) -> Any:
    """Return a seeded random model of the architecture `name`, with `options` of its configuration changed.

    With `lively`, biases, sinks and norm weights are random as well (initialised as they are, to zero or one, a model
    does not notice that one of them is lost), and RoPE frequencies stay in float32, as in a model that was loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings = ARCHITECTURES[name]
    config = AutoConfig.for_model(model_type, **{**settings, **options})
    implementation = attention or ("eager" if name in _EAGER_ONLY else "sdpa")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=implementation, dtype=torch.float32)
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                # The default of 0.02 leaves every layer close to the identity. Rates of decay are logarithms.
                if parameter.ndim >= 2 and not parameter_name.endswith("A_log"):
                    parameter.mul_(4.0)
                if any(part in parameter_name for part in _PEAKED) and parameter.ndim == 2:
                    parameter.mul_(3.0)
                if lively and parameter.ndim == 1:
                    parameter.add_(0.25 * torch.randn_like(parameter))
    tables = [(m, key, m._buffers[key]) for m in model.modules() for key in m._buffers if key.endswith("inv_freq")]
    model = model.to(dtype)
    for module, key, table in tables if lively else ():
        setattr(module, key, table)
    return model.eval()
