"""What a planted fault is, and the ways in which one is put into a transformers model, decode steps only.

Faults are planted the way that real ones arise: in the attention function, in the cache, in a norm, in the positions
that the model is called with. Each way is a context manager that leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.sites import Site

# layer, query [1, head, token, dim], key and value [1, kv head, key, dim], mask, scale -> the same, faulty
AttentionArguments = tuple[Tensor, Tensor, Tensor, Tensor | None, float]
AttentionFault = Callable[[int, Tensor, Tensor, Tensor, Tensor | None, float], AttentionArguments]
CacheFault = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """A bug that is committed on decode steps.

    Attributes:
        name: unique, in words of its mechanism.
        mechanism: class of the catalogue, M01 to M25.
        reference: a real bug of the class, repo#number.
        layer: the first layer that it touches, None for "the first layer of the model".
        sites: sites at which it may first show: where it is planted, and the one right after it.
        plant: puts it into a model.
    """

    name: str
    mechanism: str
    reference: str
    layer: int | None
    sites: tuple[Site, ...]
    plant: Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def in_attention(model: nn.Module, fault: AttentionFault) -> Iterator[None]:
    """Change what the attention function works with whenever it reads a cache."""
    from transformers import AttentionInterface

    name = "get_interface"
    original = AttentionInterface.__dict__[name]

    def get_interface(self: Any, *args: Any, **kwargs: Any) -> Callable[..., Any]:
        function = original(self, *args, **kwargs)

        def attention(module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
            if key.shape[2] > query.shape[2]:
                layer: int = module.layer_idx  # type: ignore[assignment]
                scaling = options.get("scaling") or query.shape[-1] ** -0.5
                query, key, value, mask, scaling = fault(layer, query, key, value, mask, scaling)
                options["scaling"] = scaling
            return function(module, query, key, value, mask, **options)

        return attention

    setattr(AttentionInterface, name, get_interface)
    try:
        yield
    finally:
        setattr(AttentionInterface, name, original)


@contextmanager
def in_cache(fault: CacheFault) -> Iterator[None]:
    """Change the rows that a cache hands back whenever it held some before; what it stores stays right."""
    from transformers import DynamicCache

    original = DynamicCache.update

    def update(self: Any, keys: Tensor, values: Tensor, layer: int, *args: Any, **kwargs: Any) -> Any:
        all_keys, all_values = original(self, keys, values, layer, *args, **kwargs)
        if all_keys.shape[2] > keys.shape[2]:
            all_keys, all_values = fault(layer, all_keys, all_values)
        return all_keys, all_values

    name = "update"  # inherited: what is set here on the class is deleted again
    setattr(DynamicCache, name, update)
    try:
        yield
    finally:
        delattr(DynamicCache, name)


@contextmanager
def in_positions(model: Any, offset: int) -> Iterator[None]:
    """Call the model with shifted positions on decode steps."""

    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        cache, ids = kwargs.get("past_key_values"), kwargs.get("input_ids", args[0] if args else None)
        n_cached = 0 if cache is None else int(cache.get_seq_length())
        if n_cached == 0 or ids is None:
            return None
        positions = torch.arange(n_cached, n_cached + ids.shape[1], device=ids.device)[None] + offset
        return args, {**kwargs, "position_ids": positions}

    handle = model.base_model.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def in_norms(model: nn.Module, factor: float) -> Iterator[None]:
    """Multiply the epsilon of every norm on decode steps."""
    handles: list[Any] = []

    def name_of(module: nn.Module) -> str | None:
        return next((name for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)

    def enter(module: nn.Module, args: tuple[Any, ...]) -> None:
        name = name_of(module)
        if name is not None and args and args[0].shape[-2] == 1:
            module.__dict__["_kept"] = getattr(module, name)
            setattr(module, name, getattr(module, name) * factor)

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        kept = module.__dict__.pop("_kept", None)
        name = name_of(module)
        if kept is not None and name is not None:
            setattr(module, name, kept)

    for module in model.modules():
        if "norm" in type(module).__name__.lower():
            handles.append(module.register_forward_pre_hook(enter))
            handles.append(module.register_forward_hook(leave, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
