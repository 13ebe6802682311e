"""Where the values of a model's weights really lie: in parameters, in tensors that wrap others, or away from the model.

accelerate keeps offloaded weights in a map, on the host or on a disk, and leaves parameters on the device "meta". A
hook brings them in before a module runs, converts them to the dtype that its parameter has, and sends them away again
afterwards, as new parameters. Tensors of quantisation libraries hold a few plain tensors, and have no values of their
own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.errors import CaptureError

_WORDS = (torch.uint8, torch.int8, torch.int16, torch.int32)
_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def values_of(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, list[Tensor]]]:
    """Yield every parameter in the order of names, with the plain tensors that hold its values.

    Raises:
        CaptureError: a parameter has no values anywhere.
    """
    owners = {
        f"{path}.{name}".lstrip("."): (module, name)
        for path, module in model.named_modules()
        for name in module._parameters
    }
    for name, parameter in sorted(model.named_parameters(), key=lambda item: item[0]):
        value: Tensor | None = parameter.detach()
        if parameter.is_meta:
            module, own = owners[name]
            value = next((hook.weights_map[own] for hook in _offloading(module)), None)
        if value is None or value.is_meta:
            raise CaptureError(
                f"the weights of {name} are on the device 'meta', without values, and no hook of accelerate brings "
                "them in; load the weights (from_pretrained, load_checkpoint_and_dispatch)"
            )
        yield name, parameter, list(_plain(value))


def _plain(value: Tensor) -> Iterator[Tensor]:
    """The plain tensors of one that may wrap others, by the protocol of torch for such tensors."""
    flatten = getattr(value, "__tensor_flatten__", None)
    if flatten is None:
        yield value
        return
    for name in flatten()[0]:
        yield from _plain(getattr(value, name))


def is_wrapped(value: Tensor | None) -> bool:
    """Whether a tensor wraps others, so that its values are not its own."""
    return value is not None and hasattr(value, "__tensor_flatten__")


def device_of(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its tokens: where its first weights are, or will be when they run."""
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is None:
                continue
            if not parameter.is_meta:
                return parameter.device
            for hook in _offloading(module):
                return torch.device(hook.execution_device)
    return torch.device("cpu")


def _offloading(module: nn.Module) -> Iterator[Any]:
    """The hooks of accelerate that bring the weights of a module in."""
    hook = getattr(module, "_hf_hook", None)
    for item in (hook, *getattr(hook, "hooks", ())):
        if getattr(item, "offload", False) and getattr(item, "weights_map", None) is not None:
            yield item


@contextmanager
def offloaded_at(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have offloaded weights come in as `dtype` while the context is open; where they are kept they stay as they are.

    The hook that brings a weight in gives it the dtype of its parameter, so that the empty parameter is all that is
    converted. It is found by its name, since each call leaves a new one.
    """
    changed: list[tuple[nn.Module, str, torch.dtype]] = []
    try:
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.is_meta and parameter.is_floating_point():
                    changed.append((module, name, parameter.dtype))
                    _recast(module, name, dtype)
        yield
    finally:
        for module, name, before in changed:
            _recast(module, name, before)


def _recast(module: nn.Module, name: str, dtype: torch.dtype) -> None:
    parameter = module._parameters[name]
    if parameter is not None and parameter.is_meta and parameter.dtype != dtype:
        parameter.data = torch.empty(parameter.shape, dtype=dtype, device="meta")


def matrix_numbers(module: nn.Module) -> int:
    """Return how many numbers of weight matrices a module holds, with those below it; 0 for norms and activations.

    Layers that were written for packed weights keep them as they like: as parameters, as buffers, as plain attributes,
    in two axes or in one. Integers of up to 32 bits are weights wherever they are; positions and masks are others.
    """
    return sum(tensor.numel() for each in module.modules() for tensor in own_matrices(each))


def has_experts(module: nn.Module) -> bool:
    """Whether a part has several experts to choose from, in a list or in one tensor: without, what is called a gate is
    that of a gated feed-forward part."""
    lists = (child for child in module.modules() if isinstance(child, nn.ModuleList | nn.ModuleDict) and len(child) > 1)
    if any(any(matrix_numbers(item) > 0 for item in items.children()) for items in lists):
        return True
    names = (type(child).__name__.lower() for child in module.modules())
    return any(w.ndim == 3 for w in module.parameters()) or any("expert" in name or "moe" in name for name in names)


def own_matrices(module: nn.Module) -> Iterator[Tensor]:
    """Yield the tensors of weight matrices that a module keeps itself."""
    yield from (tensor for tensor in _kept(module) if _is_matrix(tensor))


def _kept(module: nn.Module) -> Iterator[Tensor]:
    """Every tensor that a module keeps itself."""
    yield from (tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None)
    yield from _inside([value for name, value in vars(module).items() if name not in _OF_EVERY_MODULE])


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif type(value) in (list, tuple):
        yield from (item for inner in value for item in _inside(inner))
    elif type(value) is dict:
        yield from _inside(list(value.values()))


def _is_matrix(tensor: Tensor) -> bool:
    if tensor.dtype in _WORDS:
        return tensor.numel() > 1
    return tensor.ndim >= 2 and tensor.dtype not in (torch.bool, torch.int64) and tensor.shape[0] > 1


__all__ = ["device_of", "has_experts", "is_wrapped", "matrix_numbers", "offloaded_at", "own_matrices", "values_of"]
