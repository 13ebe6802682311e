"""The same weights at another precision, one decoder layer at a time: memory for one layer and not for a second model.

While a model is streamed, no parameter holds its values at the new precision. When a decoder layer is entered, its
parameters are converted into one buffer that all layers share, and let go of when it is left. Weights outside the
layers (embedding, head) are never converted as a whole: a look-up converts the rows that it takes, a product goes
through the matrix block by block. Nor are large matrices of linear modules in a layer. The forward pass is otherwise
the model's own, so whatever it computes between its layers (positions, rotary tables, masks, residuals) is computed at
the new precision as well, and the results have the same bits as those of `kvdrift.engines.torch.precision.at_dtype`,
except where a product is taken in blocks.

A parameter that is away stands as NaN in its own shape and dtype. Whoever touches it outside its layer is given the
values converted for that one call. Code that reaches it below Python gets NaN, which a verdict never takes for a pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from kvdrift.engines.torch.packed import KeptLayers
from kvdrift.engines.torch.precision import convertible, surroundings_at
from kvdrift.errors import CaptureError

# Views into the shared buffer start at multiples of this many elements, as memory of their own would.
_ALIGNED = 16
# A product with a weight outside the layers takes as many bytes of it at a time as a layer has, and no fewer than this.
# A matrix in a layer that is larger is multiplied so many bytes at a time: whole, it would lie there twice, since the
# library of matrix products packs it into memory of its own.
_LEAST_BLOCK = 8 << 20

# What is asked of a parameter without touching its values.
_FACTS = {
    getattr(Tensor, name).__get__
    for name in ("dtype", "shape", "device", "ndim", "requires_grad", "is_leaf", "layout", "is_cuda", "is_meta", "grad")
}
_FACTS |= {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.requires_grad_}


class StreamedWeights(TorchFunctionMode):
    """Hands out the values of parameters that are away; to be entered around every forward call."""

    def __init__(self, dtype: torch.dtype, parameters: Sequence[nn.Parameter], layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self._dtype = dtype
        self._native: dict[int, Tensor] = {id(parameter): parameter.data for parameter in parameters}
        self._parameters = {id(parameter): parameter for parameter in parameters}
        self._away = set(self._parameters)
        nothing: dict[torch.device, Tensor] = {}
        self._placeholders: dict[int, Tensor] = {}
        for key, data in self._native.items():
            blank = nothing.setdefault(data.device, torch.full((1,), torch.nan, dtype=dtype, device=data.device))
            self._placeholders[key] = blank.expand(data.shape)
        large = {id(matrix) for layer in layers for matrix in self._large(layer)}
        self._owned = {
            layer: [p for p in layer.parameters() if id(p) in self._native and id(p) not in large] for layer in layers
        }
        self._buffers = self._room()
        self._scratch = {
            device: torch.empty(_LEAST_BLOCK // dtype.itemsize, dtype=dtype, device=device)
            for device in {self._native[key].device for key in large}
        }
        self._inside: nn.Module | None = None
        self._handles: list[Any] = []

    def _large(self, layer: nn.Module) -> Iterator[Tensor]:
        """The matrices of a layer that are large, and that nothing but a product of torch's own module reads."""
        for module in layer.modules():
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
                n_bytes = module.weight.numel() * self._dtype.itemsize
                if id(module.weight) in self._native and n_bytes > _LEAST_BLOCK:
                    yield module.weight

    def _room(self) -> dict[torch.device, Tensor]:
        """One buffer a device, as large as the largest layer on it and, where that is small, a block of a weight."""
        most: dict[torch.device, int] = {}
        for parameters in self._owned.values():
            here: dict[torch.device, int] = {}
            for parameter in parameters:
                device = self._native[id(parameter)].device
                here[device] = here.get(device, 0) + _padded(parameter.numel())
            for device, size in here.items():
                most[device] = max(most.get(device, 0), size)
        for data in self._native.values():
            least = min(data.numel(), _LEAST_BLOCK // self._dtype.itemsize)
            most[data.device] = max(most.get(data.device, 0), least)
        return {device: torch.empty(size, dtype=self._dtype, device=device) for device, size in most.items()}

    def put_away(self) -> None:
        """Take the values out of all parameters and watch the layers."""
        for key, parameter in self._parameters.items():
            parameter.data = self._placeholders[key]
        for layer in self._owned:
            self._handles.append(layer.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(layer.register_forward_hook(self._leave, always_call=True))

    def put_back(self) -> None:
        """Give every parameter the tensor that it came with."""
        for handle in self._handles:
            handle.remove()
        for key, parameter in self._parameters.items():
            parameter.data = self._native[key]

    def _enter(self, layer: nn.Module, args: Any) -> None:
        if self._inside is not None:
            return  # a layer inside a layer: its weights are given out one by one
        with torch._C.DisableTorchFunction():
            used = dict.fromkeys(self._buffers, 0)
            for parameter in self._owned[layer]:
                native = self._native[id(parameter)]
                start = used[native.device]
                used[native.device] = start + _padded(native.numel())
                room = self._buffers[native.device][start : start + native.numel()].view(native.shape)
                parameter.data = room.copy_(native)
                self._away.discard(id(parameter))
        self._inside = layer

    def _leave(self, layer: nn.Module, args: Any, output: Any) -> None:
        if self._inside is not layer:
            return
        with torch._C.DisableTorchFunction():
            for parameter in self._owned[layer]:
                parameter.data = self._placeholders[id(parameter)]
                self._away.add(id(parameter))
        self._inside = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _FACTS or not self._touches(args, kwargs):
            return func(*args, **kwargs)
        if func is F.embedding and self._is_away(args[1:2]) and kwargs.get("max_norm") is None and len(args) < 4:
            return F.embedding(args[0], self._native[id(args[1])], *args[2:], **kwargs).to(self._dtype)
        if func is F.linear and len(args) > 1 and self._is_away(args[1:2]) and not self._is_away(args[:1]):
            return self._product(args[0], *(self._full(item) for item in args[2:]), weight=args[1], **kwargs)
        name = getattr(func, "__name__", "")
        if (name.endswith("_") and not name.endswith("__")) or name in ("__set__", "__setitem__", "__delete__"):
            raise CaptureError(
                f"the model writes to a weight outside its layer (torch function {name}), which cannot be done while "
                "one layer at a time is held at higher precision; use --ladder model (ladder='model')"
            )
        return func(*(self._full(item) for item in args), **{key: self._full(item) for key, item in kwargs.items()})

    def _is_away(self, items: Sequence[Any]) -> bool:
        return any(id(item) in self._away for item in items)

    def _touches(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        for item in (*args, *kwargs.values()):
            if id(item) in self._away or (isinstance(item, tuple | list) and self._is_away(item)):
                return True
        return False

    def _full(self, item: Any) -> Any:
        """`item` with every parameter that is away replaced by its values at the new precision."""
        if id(item) in self._away:
            return self._native[id(item)].to(self._dtype)
        if type(item) in (tuple, list):
            return type(item)(self._full(part) for part in item)
        return item

    def _product(self, x: Tensor, bias: Tensor | None = None, *, weight: nn.Parameter) -> Tensor:
        """x @ weight.T + bias, a block of rows of `weight` at a time.

        Between the layers the buffer is idle, so that the blocks are converted into it and take no memory of their own.
        """
        native, bias = self._native[id(weight)], self._full(bias)
        room = self._idle(native.device).numel() or self._buffers[native.device].numel()
        n_rows = max(1, room // native.shape[1])
        if n_rows >= native.shape[0]:
            return F.linear(x, self._block(native), bias)
        out = x.new_empty((*x.shape[:-1], native.shape[0]))
        for i in range(0, native.shape[0], n_rows):
            out[..., i : i + n_rows] = F.linear(x, self._block(native[i : i + n_rows]))
        return out if bias is None else out.add_(bias)

    def _idle(self, device: torch.device) -> Tensor:
        """The memory for a block: the shared buffer, or while a layer lies in it the one for large matrices."""
        return self._buffers[device] if self._inside is None else self._scratch.get(device, self._buffers[device][:0])

    def _block(self, rows: Tensor) -> Tensor:
        """`rows` at the new precision, in memory that is idle if there is enough."""
        room = self._idle(rows.device)
        if rows.numel() > room.numel():
            return rows.to(self._dtype)
        # Sixteen bits get to float64 faster by way of float32, which holds them exactly.
        narrow = rows.to(torch.float32) if rows.element_size() == 2 else rows
        return room[: rows.numel()].view(rows.shape).copy_(narrow)


@contextmanager
def streamed(
    model: nn.Module, dtype: torch.dtype, layers: Sequence[nn.Module], kept: KeptLayers | None = None
) -> Iterator[StreamedWeights]:
    """Keep `model` at `dtype` layer by layer while the context is open; forward calls go inside the yielded mode.

    The original tensors are put back at the end, not converted back. Buffers are converted as `at_dtype` does, and what
    is offloaded comes in layer by layer anyway.
    """
    weights = StreamedWeights(dtype, convertible(model, dtype, kept), layers)
    try:
        weights.put_away()
        with surroundings_at(model, dtype, kept):
            yield weights
    finally:
        weights.put_back()


def _padded(n: int) -> int:
    return -(-n // _ALIGNED) * _ALIGNED
