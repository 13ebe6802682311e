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
    tensor = tensor.detach()
    viewed = _VIEWED.get(tensor.dtype)
    if viewed is None:
        return np.array(tensor.cpu().numpy(), copy=True, order="C")
    integer, dtype = viewed
    return np.array(tensor.contiguous().view(integer).cpu().numpy(), copy=True, order="C").view(dtype)


def to_tensor(array: Array, device: torch.device) -> Tensor:
    """Return a copy of `array` on `device`: same shape, same dtype, same bits, those of a NaN included."""
    for torch_dtype, (integer, dtype) in _VIEWED.items():
        if array.dtype == dtype:
            view = array.view(np.int16 if integer is torch.int16 else np.uint8)
            return torch.from_numpy(view.copy()).view(torch_dtype).to(device)
    return torch.from_numpy(np.array(array, copy=True)).to(device)
