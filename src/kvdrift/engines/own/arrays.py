"""Between the arrays of any framework and numpy arrays of the same bits; imports none of the frameworks."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from kvdrift.errors import UsageError
from kvdrift.trace.model import Array

_FLOATS = ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")


def framework_of(values: Any) -> str:
    """Return the name of the package that an array is of, such as "jax"."""
    name = type(values).__module__.partition(".")[0]
    return "jax" if name == "jaxlib" else name


def to_numpy(values: Any) -> Array:
    """Return an array of any framework as a numpy array of the same shape and bits; it may share the memory.

    Raises:
        UsageError: it cannot be read, or it holds no floating-point numbers.
    """
    try:
        found = _read(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UsageError(
            f"a value of type {type(values).__name__} cannot be read as an array ({error}); hand over a numpy array"
        ) from error
    if found.dtype.name not in _FLOATS:
        raise UsageError(
            f"a value of type {type(values).__name__} holds {found.dtype.name}; hand over floating-point numbers"
        )
    return found


def _read(values: Any) -> Array:
    if isinstance(values, np.ndarray):
        return values
    framework = framework_of(values)
    if framework == "torch":
        values = values.detach().cpu()
        if str(values.dtype) == "torch.bfloat16":
            return np.asarray(values.view(sys.modules["torch"].int16).numpy().view(ml_dtypes.bfloat16))
    if framework == "mlx" and str(values.dtype) == "mlx.core.bfloat16":
        return np.array(values.view(sys.modules["mlx.core"].uint16)).view(ml_dtypes.bfloat16)
    if callable(read := getattr(values, "numpy", None)):
        return np.asarray(read())
    return np.asarray(values)


def like(array: Array, values: Any) -> Any:
    """Return a numpy array in the framework, dtype and device of `values`; None for a framework that is not known."""
    if isinstance(values, np.ndarray):
        return array.astype(values.dtype, copy=False)
    framework = framework_of(values)
    wide = array.astype(np.float64 if array.dtype == np.float64 else np.float32)
    if framework == "torch":
        return sys.modules["torch"].from_numpy(wide.copy()).to(dtype=values.dtype, device=values.device)
    if framework == "mlx":
        core = sys.modules["mlx.core"]
        return core.array(wide, dtype=core.float64 if wide.dtype == np.float64 else None).astype(values.dtype)
    if framework == "jax":
        return sys.modules["jax"].numpy.asarray(wide, dtype=values.dtype)
    if framework == "tinygrad":
        return type(values)(wide, dtype=values.dtype, device=values.device)
    return None


__all__ = ["framework_of", "like", "to_numpy"]
