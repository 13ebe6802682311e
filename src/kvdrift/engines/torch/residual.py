"""A residual stream that one pass hands on in two parts: what a layer adds, and what it is added to.

Kernels that add and normalise at once want the sum behind the layer, in the norm of the next one. A module that gets or
gives one tensor in one pass then has two of one shape in the other, and their sum is what the first pass shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site

# Where a residual stream is read.
STREAM = frozenset({Site.LAYER_IN, Site.RESID_ATTN, Site.LAYER_OUT})
_NAMES = ("hidden_states", "residual")


def first_tensor(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the first tensor among positional arguments, or the hidden states among the named ones."""
    if isinstance(args, tuple | list):
        for item in args:
            if isinstance(item, Tensor):
                return item
    hidden = kwargs.get("hidden_states")
    return hidden if isinstance(hidden, Tensor) else None


def parts_of(args: Any, kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """Return the two parts of a stream among the arguments or results of a module, None if it is in one."""
    given = [*_tensors(args), *(kwargs[name] for name in _NAMES if isinstance(kwargs.get(name), Tensor))][:2]
    if len(given) < 2 or given[0].shape != given[1].shape or given[0].ndim < 2:
        return None
    return (given[0], given[1]) if all(each.is_floating_point() for each in given) else None


def stream_of(args: Any, kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the stream among the arguments or results of a module that shows it as one tensor in another call."""
    parts = parts_of(args, kwargs)
    if parts is None:
        return first_tensor(args, kwargs)
    with torch._C.DisableTorchFunction():
        return parts[0] + parts[1]


def with_stream(
    args: tuple[Any, ...], kwargs: dict[str, Any], parts: tuple[Tensor, Tensor], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module with `value` in the place of the sum of two parts: one of them, and zeros."""
    by_id = {id(parts[0]): value.to(parts[0].dtype), id(parts[1]): torch.zeros_like(parts[1])}

    def put(item: Any) -> Any:
        if isinstance(item, tuple | list):
            return type(item)(put(each) for each in item)
        return by_id.get(id(item), item)

    return tuple(put(item) for item in args), {name: put(item) for name, item in kwargs.items()}


def _tensors(value: Any) -> Iterator[Tensor]:
    items = value if isinstance(value, tuple | list) else (value,)
    for item in items:
        inner = item if isinstance(item, tuple | list) else (item,)
        yield from (each for each in inner if isinstance(each, Tensor))


__all__ = ["STREAM", "first_tensor", "parts_of", "stream_of", "with_stream"]
