"""What callers hand over as a model: a language model, one inside of an adapter or a wrapper, or something else.

An adapter that changes weights or layers leaves the forward pass of its base model what it is; there the base model is
run, with the adapter in it. A wrapper does something around the model that an audit of the model would not see; there
the caller is told what to pass instead.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from kvdrift.engines.function import WRAP_IT
from kvdrift.errors import EngineUnavailable, UsageError

CACHE_NAMES = ("past_key_values", "cache_params", "cache")  # under which forward calls take and return a cache
_PEFT = ("PeftModel", "PeftMixedModel")
# Classes of PEFT whose forward pass is the base model's; AdaLoRA adds to the loss alone.
_BASE_FORWARD = ("BaseTuner", "AdaLoraModel", "Module")


def language_model(model: Any) -> tuple[Any, tuple[str, ...]]:
    """Return the language model to run, and notes on what was taken off around it.

    Raises:
        UsageError: this is not a torch module.
        EngineUnavailable: it is a wrapper, an adapter with tokens of its own, or a model that cannot decode; the text
            says what to pass instead.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"the model is of type {type(model).__name__}; pass a loaded model, such as that of "
            f"AutoModelForCausalLM.from_pretrained(...). If it is no transformers model, {WRAP_IT}"
        )
    notes: tuple[str, ...] = ()
    while any(kind.__module__.partition(".")[0] == "peft" and kind.__name__ in _PEFT for kind in type(model).__mro__):
        model, note = _inside_of_adapter(model)
        notes = (*notes, note)
    if getattr(model, "config", None) is None:
        raise EngineUnavailable(_no_config(model))
    return model, notes


def _inside_of_adapter(model: Any) -> tuple[Any, str]:
    """Return the base model of a PEFT model, whose layers have the adapters in them, and a note on these."""
    names = getattr(model, "active_adapters", None) or [model.active_adapter]
    names = [names] if isinstance(names, str) else list(names)
    configs = [model.peft_config[name] for name in names if name in model.peft_config]
    kind = ", ".join(dict.fromkeys(str(getattr(c.peft_type, "value", c.peft_type)) for c in configs))
    instead = "pass model.get_base_model() to audit the model without the adapter"
    if any(config.is_prompt_learning for config in configs):
        n_tokens = max(int(getattr(config, "num_virtual_tokens", 0) or 0) for config in configs)
        raise EngineUnavailable(
            f"{type(model).__name__} has an adapter of kind {kind}, which puts {n_tokens} virtual tokens of its own "
            f"before the tokens of every forward call, a decode step on a cache included; {instead}"
        )
    instead = "load the base model without the adapter, and pass that"
    if any(getattr(config, "alora_invocation_tokens", None) for config in configs):
        raise EngineUnavailable(
            f"{type(model).__name__} has an activated {kind} adapter, which is switched on by tokens of the prompt, "
            f"outside of the model's own forward pass; {instead}"
        )
    runs = next((tuner.__name__ for tuner in type(model.base_model).__mro__ if "forward" in vars(tuner)), "")
    if runs not in _BASE_FORWARD:
        raise EngineUnavailable(
            f"{type(model).__name__} has an adapter of kind {kind}, whose own forward pass ({runs}) does more than "
            f"that of the base model; {instead}"
        )
    # A model of several kinds of adapters has no method for it.
    base = model.get_base_model() if hasattr(model, "get_base_model") else model.base_model.model
    return base, f"PEFT adapter {', '.join(names)} ({kind}) was in the layers of the {type(base).__name__} that was run"


def _no_config(model: nn.Module) -> str:
    kind = type(model).__name__
    found = inner_model(model)
    if found is None:
        return (
            f"{kind} has no config, so it is no transformers model; {WRAP_IT} (a kvdrift.TorchEngine takes any "
            "model of torch that decodes with a cache)"
        )
    path, inner = found
    return (
        f"{kind} has no config of its own and wraps a {type(inner).__name__}; what it does beside the forward pass of "
        f"that model would not be audited. Pass the model inside of it, model.{path}"
    )


def inner_model(model: nn.Module) -> tuple[str, nn.Module] | None:
    """Return the outermost model of transformers inside of `model` that has a language-modelling head, and its path."""
    from transformers import PreTrainedModel

    for name, module in model.named_modules():
        if module is not model and isinstance(module, PreTrainedModel) and module.get_output_embeddings() is not None:
            return name, module
    return None


def parameters_taken(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return what `forward` takes, and with `**kwargs` what the model inside of it takes by these."""
    own = dict(inspect.signature(model.forward).parameters)
    passes_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in own.values())
    found = inner_model(model) if passes_on else None
    if found is not None:
        inner = inspect.signature(found[1].forward).parameters
        own.update({name: inner[name] for name in ("attention_mask", "position_ids") if name in inner})
    return own


def asks_for_cache(taken: Mapping[str, inspect.Parameter]) -> dict[str, bool]:
    """Return what a call asks for its cache with, nothing for a wrapper whose `forward` does not take it."""
    takes = any(p.kind is inspect.Parameter.VAR_KEYWORD or p.name == "use_cache" for p in taken.values())
    return {"use_cache": True} if takes else {}


def cache_argument(model: nn.Module, config: Any, taken: Mapping[str, inspect.Parameter]) -> str:
    """Return the name under which the model takes its cache: `cache` in all models since transformers 5.24, where Mamba
    models had a name of their own before."""
    if bool(getattr(config, "is_encoder_decoder", False)):
        raise EngineUnavailable(
            f"{type(model).__name__} is an encoder-decoder; kvdrift audits decoder-only language models. Pass "
            "one of those, such as a model of AutoModelForCausalLM."
        )
    for name in CACHE_NAMES:
        if name in taken and "dict" not in str(taken[name].annotation).lower():  # XLM has a dictionary of its own
            return name
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values()):
        return "past_key_values"
    raise EngineUnavailable(
        f"{type(model).__name__}.forward takes no past_key_values, so it has no cached decode step to audit; "
        "encoder-only models and models without a cache cannot be audited. If it has a cache of another kind, "
        f"{WRAP_IT}"
    )


def returned_cache(output: Any) -> Any:
    """Return the cache that a forward call returned under one of its names, None if it has none."""
    return next((cache for name in CACHE_NAMES if (cache := getattr(output, name, None)) is not None), None)


def logits_of(output: Any, vocab_size: int) -> Tensor | None:
    """Return the logits [row, token, vocabulary] of what a forward call returned, None if it has none.

    A model that returns a plain tuple has them first among the tensors that are as wide as the vocabulary.
    """
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple | list | Tensor):
        items = (output,) if isinstance(output, Tensor) else output
        logits = next((x for x in items if isinstance(x, Tensor) and x.ndim == 3 and x.shape[-1] >= vocab_size), None)
    return logits if isinstance(logits, Tensor) else None


def why_no_logits(model: Any, logits: Tensor | None, n_tokens: int, vocab_size: int) -> str | None:
    """Say why what a model returned for `n_tokens` tokens are not the logits of a language model, None if they are."""
    kind = type(model).__name__
    load = "load the checkpoint with a language-modelling head (AutoModelForCausalLM)."
    if logits is None:
        return f"{kind} returns no logits, so it is not a causal language model; {load}"
    shape = list(logits.shape)
    if logits.ndim == 3 and logits.shape[-1] >= min(vocab_size, getattr(model.config, "vocab_size", vocab_size)):
        return None
    labels = getattr(model.config, "num_labels", None)
    if logits.ndim == 3 and (logits.shape[1] == 1 or logits.shape[-1] != labels):
        return None
    head = "a classification head" if logits.shape[-1] == labels else "no head over the vocabulary"
    return f"{kind} returns logits of shape {shape} for {n_tokens} tokens: {head}, without a next token; {load}"


def _keeps_tuples(output: Any) -> bool:
    """Whether a forward call returned its cache as tuples of keys and values, layer by layer."""
    cache = returned_cache(output)
    if cache is None and isinstance(output, tuple | list):
        cache = next((item for item in output if isinstance(item, tuple)), None)
    return isinstance(cache, tuple | list) and bool(cache) and all(isinstance(item, tuple | list) for item in cache)


def refuse_tuples(model: Any, ids: Tensor) -> None:
    """Refuse a model that keeps its cache as tuples, by what it returns when it is given none.

    Raises:
        EngineUnavailable: it does.
    """
    try:
        output = model(ids, use_cache=True)
    except Exception:  # noqa: BLE001 - then the error of the call with a cache is the one to tell
        return
    if _keeps_tuples(output):
        raise EngineUnavailable(
            f"{type(model).__name__} keeps its cache as tuples of (key, value), and reads and writes are seen on a "
            "Cache of transformers alone; let its forward take a DynamicCache as past_key_values, add to it by "
            f"past_key_values.update(key, value, layer) and return it, and pass the model again, or {WRAP_IT}"
        )


def text_config(model: Any) -> Any:
    """The configuration of the part that writes text, where a model has several."""
    read = getattr(model.config, "get_text_config", None)
    return read(decoder=True) if read is not None else model.config


@contextmanager
def returning_objects(model: nn.Module) -> Iterator[None]:
    """Have modules return objects with names instead of tuples while the context is open; their configurations say."""
    configs = {id(c): c for c in (getattr(m, "config", None) for m in model.modules()) if c is not None}
    changed = [config for config in configs.values() if getattr(config, "return_dict", True) is False]
    try:
        for config in changed:
            config.return_dict = True
        yield
    finally:
        for config in changed:
            config.return_dict = False


__all__ = [
    "CACHE_NAMES",
    "asks_for_cache",
    "cache_argument",
    "inner_model",
    "language_model",
    "logits_of",
    "parameters_taken",
    "refuse_tuples",
    "returned_cache",
    "returning_objects",
    "text_config",
    "why_no_logits",
]
