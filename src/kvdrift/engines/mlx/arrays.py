"""Between mlx arrays and numpy arrays, and between their names of dtypes and ours."""

from __future__ import annotations

import math
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


def function_error(dtype: Any, n_positions: int) -> float:
    """Return the largest error of elementary functions of mlx at a dtype, against numpy at float64.

    The arguments are 4,096 numbers that the dtype holds: for exp from -16 to 0, as softmax has them, for tanh and erf
    from -4 to 4, for sin and cos up to `n_positions`, the largest angle of a rotation.
    """
    worst = 0.0
    for name, low, high, exact in (
        ("exp", -16.0, 0.0, np.exp),
        ("tanh", -4.0, 4.0, np.tanh),
        ("erf", -4.0, 4.0, np.vectorize(math.erf)),
        ("sin", 0.0, n_positions, np.sin),
        ("cos", 0.0, n_positions, np.cos),
    ):
        given = mx.array(np.linspace(low, high, 4096), dtype=dtype)
        found = np.array(getattr(mx, name)(given).astype(mx.float64))
        worst = max(worst, float(np.max(np.abs(found - exact(np.array(given.astype(mx.float64)))))))
    return worst


__all__ = ["DTYPES", "dtype_name", "function_error", "is_floating", "to_mlx", "to_numpy"]
