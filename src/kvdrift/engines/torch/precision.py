"""The same weights at another precision: parameters are swapped in place and put back untouched.

In place, because a model may hold functions bound to its own modules (patched forwards, closures), which a copy of
the model would keep calling on the original.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.packed import KeptLayers
from kvdrift.engines.torch.refolded import refolded
from kvdrift.engines.torch.weights import is_wrapped, offloaded_at
from kvdrift.errors import EngineUnavailable

DTYPES: dict[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name by which traces call `dtype`, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def native_dtype(model: nn.Module) -> str:
    """The dtype of the weight matrices: norms are often kept wider."""
    counts: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            counts[parameter.dtype] = counts.get(parameter.dtype, 0) + parameter.numel()
    if not counts:
        raise EngineUnavailable("the model has no floating-point parameters; quantised weights are not supported here")
    return dtype_name(max(counts, key=lambda dtype: counts[dtype]))


@contextmanager
def at_dtype(model: nn.Module, dtype: torch.dtype, kept: KeptLayers | None = None) -> Iterator[None]:
    """Run `model` with all its floating-point parameters and buffers in `dtype`.

    The original tensors are kept aside and put back, not converted back, so they are the same bits afterwards. Buffers
    that are wider than `dtype` stay as they are: models keep some (RoPE frequencies) in float32 on purpose. What holds
    the rounded product of two others is their product in `dtype`. The layers `kept` run at their own dtype.
    """
    parameters: list[tuple[nn.Parameter, Tensor]] = []
    finer = refolded(model, dtype)
    try:
        for parameter in convertible(model, dtype, kept):
            parameters.append((parameter, parameter.data))
            parameter.data = finer.get(id(parameter), parameter.data).to(dtype)
        with surroundings_at(model, dtype, kept, finer):
            yield
    finally:
        for parameter, data in parameters:
            parameter.data = data


def convertible(model: nn.Module, dtype: torch.dtype, kept: KeptLayers | None) -> list[nn.Parameter]:
    """Return the parameters whose values are in them and have to be converted to `dtype`."""
    stay = set() if kept is None else kept.tensors()
    return [
        parameter
        for parameter in model.parameters()
        if parameter.is_floating_point() and parameter.dtype != dtype and not parameter.is_meta
        if id(parameter) not in stay and not is_wrapped(parameter)
    ]


@contextmanager
def surroundings_at(
    model: nn.Module, dtype: torch.dtype, kept: KeptLayers | None, finer: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Hold at `dtype`, while the context is open, what a model computes with beside the weights that are in it."""
    with (
        buffers_at(model, dtype, kept, finer),
        offloaded_at(model, dtype),
        eager_experts(model),
        nullcontext() if kept is None else kept.beside(dtype),
    ):
        yield


@contextmanager
def buffers_at(
    model: nn.Module, dtype: torch.dtype, kept: KeptLayers | None = None, finer: Mapping[int, Tensor] | None = None
) -> Iterator[None]:
    """Hold the floating-point buffers that are narrower than `dtype` in `dtype` while the context is open; those that
    are known `finer`, by their id, as they are there."""
    buffers: list[tuple[nn.Module, str, Tensor]] = []
    wide = torch.finfo(dtype).bits
    stay = set() if kept is None else kept.tensors()
    try:
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is None or id(buffer) in stay:
                    continue
                if buffer.is_floating_point() and torch.finfo(buffer.dtype).bits < wide:
                    buffers.append((module, name, buffer))
                    module._buffers[name] = (finer or {}).get(id(buffer), buffer).to(dtype)
        yield
    finally:
        for module, name, buffer in buffers:
            module._buffers[name] = buffer


@contextmanager
def eager_experts(model: Any) -> Iterator[None]:
    """Compute experts one by one while the context is open: the grouped kernels exist for half precision only."""
    read = getattr(model, "get_experts_implementation", None)
    before = read() if read is not None and model._can_set_experts_implementation() else None
    if before is None or set(before.values()) <= {None, "eager"}:
        yield
        return
    model.set_experts_implementation("eager")
    try:
        yield
    finally:
        model.set_experts_implementation(before)
