"""Weights that hold those of a norm as well, computed anew from the two at a finer precision.

An engine may multiply the weights of a norm into the matrices behind it, `W' = W diag(g)`, and keep both: a decode
kernel reads `W'`, and prefill reads `W` and `g`. In the model's own dtype `W'` is rounded once more. At a finer dtype
the converted `W'` would still be that rounded one, and what is rounding would look like another function. Where the
bits of `W'` are those of the rounded product, it is computed anew there. Other bits are no such product, and stay.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Folded(NamedTuple):
    """A matrix and the gains that were multiplied into its columns."""

    weight: Tensor
    gain: Tensor
    is_offset: bool  # whether the gain is 1 + g

    def at(self, dtype: torch.dtype) -> Tensor:
        """Return the product in a dtype."""
        gain = self.gain.to(dtype)
        return self.weight.to(dtype) * (1.0 + gain if self.is_offset else gain)

    def rounded(self, rows: slice | int, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield rows of the product as `dtype` holds them, in each way in which it may have been rounded."""
        own = self.weight[rows]
        gain = 1.0 + self.gain if self.is_offset else self.gain
        yield (own * gain).to(dtype)
        yield (own.float() * ((1.0 + self.gain.float()) if self.is_offset else self.gain.float())).to(dtype)


def refolded(model: nn.Module, dtype: torch.dtype) -> Mapping[int, Tensor]:
    """Return, by the id of a parameter or buffer that is narrower than `dtype` and holds such products, what it is in
    `dtype`; several of them may stand one below the other.

    Both factors are parameters of the same layer, as far as names tell: of the same numbered part of the model.
    """
    scopes: dict[str, list[Tensor]] = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if _is_plain(tensor) and tensor.ndim in (1, 2) and tensor.numel():
            scopes.setdefault(_scope(name), []).append(tensor)
    found: dict[int, Tensor] = {}
    for tensors in scopes.values():
        matrices = [tensor for tensor in tensors if tensor.ndim == 2]
        gains = [tensor for tensor in tensors if tensor.ndim == 1]
        for matrix in matrices:
            if matrix.dtype.itemsize >= dtype.itemsize:
                continue
            ways = [
                _Folded(other, gain, is_offset)
                for other in matrices
                if other is not matrix and other.shape[1] == matrix.shape[1]
                for gain in gains
                if len(gain) == matrix.shape[1]
                for is_offset in (False, True)
            ]
            if (parts := _parts(matrix, ways)) is not None:
                found[id(matrix)] = torch.cat([part.at(dtype) for part in parts])
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers itself: a quantised one neither multiplies nor compares like these."""
    return type(tensor.data) is Tensor and tensor.is_floating_point() and not tensor.is_meta


def _scope(name: str) -> str:
    """The numbered part of a model that a name belongs to, "" if it belongs to none."""
    parts = name.split(".")
    return next((".".join(parts[: at + 1]) for at, part in enumerate(parts) if part.isdigit()), "")


def _parts(matrix: Tensor, ways: list[_Folded]) -> list[_Folded] | None:
    """The products that stand one below the other in a matrix, None if it is made of anything else."""
    found: list[_Folded] = []
    at = 0
    while at < len(matrix):
        part = next((way for way in ways if _is_at(matrix, at, way)), None)
        if part is None:
            return None
        found.append(part)
        at += len(part.weight)
    return found


def _is_at(matrix: Tensor, at: int, way: _Folded) -> bool:
    """Whether the rows of a matrix from `at` on have the bits of a product; its first row rules out nearly all."""
    rows = len(way.weight)
    if at + rows > len(matrix):
        return False
    if not any(torch.equal(row, matrix[at]) for row in way.rounded(0, matrix.dtype)):
        return False
    whole = matrix[at : at + rows]
    if torch.equal(way.weight.to(matrix.dtype), whole):
        return False  # a copy: gains that are one fold nothing
    return any(torch.equal(made, whole) for made in way.rounded(slice(None), matrix.dtype))


__all__ = ["refolded"]
