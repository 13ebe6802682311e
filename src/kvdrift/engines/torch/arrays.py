"""Between torch tensors and numpy arrays, bit by bit, for the dtypes that numpy does not know by itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from kvdrift.trace.model import Array

# torch dtype -> (torch integer view of the same width, numpy dtype)
_VIEWED: dict[torch.dtype, tuple[torch.dtype, type]] = {
    torch.bfloat16: (torch.int16, ml_dtypes.bfloat16),
    torch.float8_e4m3fn: (torch.uint8, ml_dtypes.float8_e4m3fn),
    torch.float8_e5m2: (torch.uint8, ml_dtypes.float8_e5m2),
}


def to_array(tensor: Tensor) -> Array:
    """Return a contiguous copy of `tensor` on the CPU: same shape, same dtype, same bits, those of a NaN included."""
    viewed = _VIEWED.get(tensor.dtype)
    copy = _numbers(tensor).copy()
    return copy if viewed is None else copy.view(viewed[1])


def rows_of(tensor: Tensor, at: Tensor | None) -> Array:
    """Return a contiguous copy of rows of `tensor` [token, ...] on the CPU, [row, element]: same dtype, same bits.

    Args:
        tensor: on any device.
        at: the rows that are wanted, on the same device; None for all.
    """
    if not tensor.is_cpu:  # what is not wanted stays on the device
        return to_array((tensor if at is None else tensor[at]).flatten(1))
    viewed = _VIEWED.get(tensor.dtype)
    rows = _numbers(tensor)
    # Three operations of numpy take a third of the time of three of torch, and this is done for each value of a pass.
    copy = rows.copy() if at is None else np.ascontiguousarray(rows[at.numpy()])
    copy = copy.reshape(len(copy), -1)
    return copy if viewed is None else copy.view(viewed[1])


def _numbers(tensor: Tensor) -> Array:
    """The values of `tensor` on the CPU as numpy has them, or as integers of their width; no copy if they lie there."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    viewed = _VIEWED.get(tensor.dtype)
    if viewed is not None:
        tensor = tensor.view(viewed[0])
    numbers: Array = (tensor if tensor.is_cpu else tensor.cpu()).numpy()
    return numbers


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """Return a copy of `array` on `device`: same shape, same dtype, same bits, those of a NaN included."""
    for torch_dtype, (integer, dtype) in _VIEWED.items():
        if array.dtype == dtype:
            view = array.view(np.int16 if integer is torch.int16 else np.uint8)
            return torch.from_numpy(view.copy()).view(torch_dtype).to(device)
    return torch.from_numpy(np.array(array, copy=True)).to(device)
