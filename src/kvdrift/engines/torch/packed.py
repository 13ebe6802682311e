"""Layers whose weights are packed, and which of them can run at another precision than their own.

A packed weight holds several numbers in one integer, or numbers of a byte with scales beside them. A layer that unpacks
it in torch follows its inputs to any dtype; a kernel, or a tensor that only its library can read, does not. Such layers
keep their dtype on the upper rungs of the ladder: their inputs are cast to it, and what they return is cast back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.weights import is_wrapped

_WORDS = (torch.uint8, torch.int8, torch.int16, torch.int32)
# Libraries whose layers compute in a dtype of their own, whatever they are given.
_OWN_DTYPE = ("bitsandbytes",)


@dataclass(frozen=True, slots=True)
class PackedLayer:
    """A module that holds packed weights itself; `why` says why it cannot leave its dtype, None if it perhaps can."""

    name: str
    module: nn.Module
    why: str | None


def packed_layers(model: nn.Module) -> list[PackedLayer]:
    """Return the modules that hold packed weights, in the order of the model."""
    return [
        PackedLayer(name, module, _why_fixed(module)) for name, module in model.named_modules() if _is_packed(module)
    ]


def _own(module: nn.Module) -> Iterator[Tensor]:
    yield from (tensor for tensor in (*module._parameters.values(), *module._buffers.values()) if tensor is not None)


def _is_packed(module: nn.Module) -> bool:
    return any(
        is_wrapped(tensor)
        or (tensor.ndim >= 2 and tensor.dtype in _WORDS)
        or (tensor.is_floating_point() and tensor.dtype.itemsize == 1)
        for tensor in _own(module)
    )


def _why_fixed(module: nn.Module) -> str | None:
    wrapped = next((tensor for tensor in _own(module) if is_wrapped(tensor)), None)
    if wrapped is not None:
        return f"its weight is a {type(wrapped).__name__}"
    if any(kind.__module__.partition(".")[0] in _OWN_DTYPE for kind in type(module).__mro__):
        return "it computes in a dtype of its own"
    if any(tensor.is_floating_point() and tensor.dtype.itemsize == 1 for tensor in _own(module)):
        return "its weights are numbers of one byte"
    return None


class InputsSeen:
    """Notes one input of each packed layer while a model runs, to try the layer with later."""

    def __init__(self, layers: Sequence[PackedLayer]) -> None:
        self.found: dict[nn.Module, Tensor] = {}
        self._layers = layers

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hook the layers while the context is open."""
        handles = [layer.module.register_forward_pre_hook(self._note) for layer in self._layers if layer.why is None]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor) and args[0].is_floating_point():
            self.found[module] = args[0].detach()


def fixed_layers(
    layers: Sequence[PackedLayer],
    inputs: InputsSeen,
    dtype: torch.dtype,
    running: Callable[[], AbstractContextManager[Any]],
) -> list[PackedLayer]:
    """Return the layers that cannot run at `dtype`: those that say so, and those that fail on an input of that dtype,
    of several tokens or of one. `running` is entered around each trial."""
    return [
        layer
        for layer in layers
        if layer.why is not None or not _runs(layer.module, inputs.found.get(layer.module), dtype, running)
    ]


def _runs(
    module: nn.Module, seen: Tensor | None, dtype: torch.dtype, running: Callable[[], AbstractContextManager[Any]]
) -> bool:
    if seen is None:
        return True
    with _converted(module, dtype), running():
        for x in (seen, seen[..., -1:, :]):
            try:
                out = module(x.to(dtype))
            except Exception:  # noqa: BLE001 - a kernel that lacks a dtype says so in many ways
                return False
            if not isinstance(out, Tensor) or out.dtype != dtype:
                return False
    return True


@contextmanager
def _converted(module: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Hold the floating-point tensors that a module has itself in `dtype`, if they are narrower."""
    parameters = [(p, p.data) for p in module._parameters.values() if p is not None and p.is_floating_point()]
    buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_floating_point()}
    try:
        for parameter, data in parameters:
            parameter.data = data.to(dtype)
        for name, buffer in buffers.items():
            if torch.finfo(buffer.dtype).bits < torch.finfo(dtype).bits:
                module._buffers[name] = buffer.to(dtype)
        yield
    finally:
        for parameter, data in parameters:
            parameter.data = data
        module._buffers.update(buffers)


@dataclass(frozen=True, slots=True)
class KeptLayers:
    """Layers that keep their dtype, `native`, whatever the rest of the model runs at.

    `at_rest` hears when such a layer begins (True) and ends (False): nothing inside is to be lifted to another dtype.
    """

    modules: Sequence[nn.Module]
    native: torch.dtype
    at_rest: Callable[[bool], None]

    @contextmanager
    def beside(self, dtype: torch.dtype) -> Iterator[None]:
        """Cast what goes into the layers to their own dtype, and what comes out to `dtype`, while the context is
        open."""

        def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self.at_rest(True)
            native = self.native
            return tuple(_cast(x, native) for x in args), {name: _cast(x, native) for name, x in kwargs.items()}

        def leave(module: nn.Module, args: Any, output: Any) -> Any:
            self.at_rest(False)
            return tuple(_cast(x, dtype) for x in output) if type(output) is tuple else _cast(output, dtype)

        with ExitStack() as stack:
            for module in self.modules:
                stack.callback(module.register_forward_pre_hook(enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(leave, prepend=True, always_call=True).remove)
            yield

    def tensors(self) -> set[int]:
        """The identities of the parameters and buffers that stay as they are."""
        return {id(tensor) for module in self.modules for tensor in _own(module)}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    """`value` as `dtype` if it is a tensor of floating-point numbers; anything else as it is."""
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def describe_fixed(layers: Sequence[PackedLayer], native: str) -> str:
    """Say which layers keep their dtype on the upper rungs."""
    kinds: dict[str, int] = {}
    for layer in layers:
        wrapped = next((type(t).__name__ for t in _own(layer.module) if is_wrapped(t)), None)
        kind = type(layer.module).__name__ + (f" with a weight of type {wrapped}" if wrapped else "")
        kinds[kind] = kinds.get(kind, 0) + 1
    found = ", ".join(f"{count} of type {kind}" for kind, count in kinds.items())
    return (
        f"{len(layers)} quantised layers stayed at {native} on the upper rungs of the ladder ({found}): they "
        "round there as they do at the native dtype, and a fault inside of one of them must exceed that to be seen"
    )


__all__ = ["InputsSeen", "KeptLayers", "PackedLayer", "describe_fixed", "fixed_layers", "packed_layers"]
