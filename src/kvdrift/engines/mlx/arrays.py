"""Between mlx arrays and numpy arrays, and between their names of dtypes and ours."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import mlx.core as mx
import numpy as np

from kvdrift.trace.model import Array

DTYPES = {"bfloat16": mx.bfloat16, "float16": mx.float16, "float32": mx.float32, "float64": mx.float64}


def dtype_name(dtype: Any) -> str:
    """Return the name by which traces call a dtype of mlx, such as "bfloat16"."""
    return str(dtype).rpartition(".")[2]


def to_numpy(array: Any) -> Array:
    """Return a copy of an mlx array: same shape, same dtype, same bits, those of a NaN included."""
    if array.dtype == mx.bfloat16:
        return np.array(array.view(mx.uint16), copy=True).view(ml_dtypes.bfloat16)
    return np.array(array, copy=True)


def to_mlx(array: Array) -> Any:
    """Return an mlx array of the same shape, dtype and bits."""
    if array.dtype == ml_dtypes.bfloat16:
        return mx.array(np.ascontiguousarray(array).view(np.uint16)).view(mx.bfloat16)
    return mx.array(np.ascontiguousarray(array), dtype=DTYPES.get(array.dtype.name))


def is_floating(array: Any) -> bool:
    """Whether an mlx array holds floating-point numbers."""
    return bool(mx.issubdtype(array.dtype, mx.floating))


__all__ = ["DTYPES", "dtype_name", "is_floating", "to_mlx", "to_numpy"]
