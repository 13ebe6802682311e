"""Layers for packed weights that belong to no library, and the same with a fault in what they do for one token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """A projection whose weights are integers with scales, which `kept` holds as a layer of somebody's own may.

    `is_faulty`: a single token is multiplied with the scales of the neighbours.
    """

    def __init__(self, linear: nn.Linear, is_faulty: bool = False) -> None:
        super().__init__()
        self.is_faulty = is_faulty
        self.keep(linear.weight.detach().float(), linear.weight.dtype)

    def keep(self, weight: Tensor, dtype: torch.dtype) -> None:
        """Keep codes and scales of a weight [out, in]."""
        raise NotImplementedError

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        """Return the product; scales are those of so many rows further."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with `x` [row, token, in]."""
        return self.multiply(x, 1 if self.is_faulty and x.shape[1] == 1 else 0)


def coded(weight: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Codes of the rows of a matrix, and their scales [row, 1]."""
    scales = weight.abs().amax(-1, keepdim=True).clamp(min=1e-9) / largest
    return (weight / scales).round().to(torch.int8), scales


class Rows(Packed):
    """Eight bits, a scale for each row; both are buffers."""

    def keep(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scales = coded(weight, 127)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales.to(dtype))

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        buffers: Any = self
        return F.linear(x, buffers.codes.to(x.dtype) * buffers.scales.to(x.dtype).roll(shift, 0))


class Columns(Packed):
    """Eight bits in parameters [in, out], as Conv1D has them; the scales come behind the sum."""

    def keep(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scales = coded(weight, 127)
        self.codes = nn.Parameter(codes.T.contiguous(), requires_grad=False)
        self.scales = nn.Parameter(scales[:, 0].to(dtype), requires_grad=False)

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        return (x @ self.codes.to(x.dtype)) * self.scales.to(x.dtype).roll(shift)


class Groups(Packed):
    """Two weights of four bits in a byte, in one axis, and a scale for each 16 of a row; plain attributes."""

    def keep(self, weight: Tensor, dtype: torch.dtype) -> None:
        codes, scales = coded(weight.reshape(len(weight), -1, 16), 7)
        both = (codes + 8).to(torch.uint8).flatten()
        self.shape = weight.shape
        self.held = {"bytes": both[::2] | (both[1::2] << 4), "scales": scales.to(dtype)}

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        both, scales = self.held["bytes"], self.held["scales"].to(x.dtype).roll(shift, 1)
        codes = torch.stack([both & 15, both >> 4], -1).to(x.dtype) - 8
        return F.linear(x, (codes.reshape(*scales.shape[:-1], 16) * scales).reshape(self.shape))


class Activations(Rows):
    """Eight bits on both sides: rows are rounded on the fly."""

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        buffers: Any = self
        codes, scales = coded(x.float(), 127)
        product = F.linear(codes.float(), buffers.codes.float()) * scales
        found: Tensor = (product * buffers.scales[:, 0].float().roll(shift)).to(x.dtype)
        return found


KINDS: tuple[type[Packed], ...] = (Rows, Columns, Groups, Activations)


def replaced(model: Any, make: Callable[[nn.Linear, str], nn.Module]) -> Any:
    """Return the model with every linear layer below the head replaced; `make` also gets its name."""
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, make(module, name))
    return model
