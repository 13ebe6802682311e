"""How large a fault is on a model, measured: the relative change of each tensor that a decode step hands on."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.model import Commits, Fault, Plant
from kvdrift_bench.planted.torch.parts import decoder_layers


def measured(fault: Fault, model: Any, tokens: Sequence[int], *, span: int = 2) -> Fault:
    """Return the fault with its `size` on `model`: relative change in the 2-norm by tensor, the largest over the last
    `span` tokens, which are decoded on top of the others."""
    clean, _ = decoded(model, tokens, span)
    wrong, _ = decoded(model, tokens, span, fault.plant)
    return replace(fault, size={name: _relative(clean[name], wrong[name]) for name in clean})


def decoded(
    model: Any, tokens: Sequence[int], span: int, plant: Plant | None = None
) -> tuple[dict[str, list[Tensor]], Commits | None]:
    """Decode the last `span` tokens on top of the others, and return layer outputs, logits and cache by name, one
    tensor for each step."""
    from transformers import DynamicCache

    found: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def after(module: Any, args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] == 1:
                found.setdefault(name, []).append(hidden.detach().clone())

        return after

    with plant(model) if plant is not None else nullcontext() as commits, torch.no_grad():
        handles = [
            block.register_forward_hook(keep(f"layer {layer}")) for layer, block in enumerate(decoder_layers(model))
        ]
        try:
            cache = DynamicCache(config=model.config)
            recurrent = all(not hasattr(layer, "get_seq_length") for layer in cache.layers) and len(cache.layers) > 0
            name = "cache_params" if recurrent else "past_key_values"
            ids = torch.tensor([list(tokens)], device=next(model.parameters()).device)
            model(ids[:, :-span], **{name: cache}, use_cache=True)
            for step in range(len(tokens) - span, len(tokens)):
                logits = model(ids[:, step : step + 1], **{name: cache}, use_cache=True).logits
                found.setdefault("logits", []).append(logits.detach().clone())
        finally:
            for handle in handles:
                handle.remove()
    return found, commits


def _relative(clean: list[Tensor], wrong: list[Tensor]) -> float:
    changes = [float((w.double() - c.double()).norm() / c.double().norm()) for c, w in zip(clean, wrong, strict=True)]
    return max(changes)
