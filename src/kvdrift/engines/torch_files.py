"""Reads .pt files of plain values and tensors with torch, which unpickles nothing else: the one place that does.

`weights_only=True` restricts the unpickler to tensors and containers, so that a file cannot run code.
"""

from __future__ import annotations

import pickle  # noqa: TID251 - only for the name of the exception that torch raises
import warnings
from pathlib import Path
from typing import Any

from kvdrift.errors import EngineUnavailable, TraceError


def read_tensor_file(path: Path) -> Any:
    """Return what a .pt file holds, with every tensor as a numpy array (bfloat16 by ml_dtypes).

    Raises:
        EngineUnavailable: torch is not installed.
        TraceError: the file is damaged, or holds anything but tensors, numbers, strings and containers of them.
    """
    try:
        import torch
    except ModuleNotFoundError as error:
        raise EngineUnavailable("reading .pt files needs 'torch'; pip install 'kvdrift[hf]'") from error
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old formats; what cannot be read is an error below
            found = torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors and containers
    except pickle.UnpicklingError as error:
        raise TraceError(
            f"{path} holds something that is not a tensor, a number or a string, and is not unpickled: {_words(error)}"
        ) from error
    except Exception as error:  # torch's unpickler follows a damaged file until anything at all breaks
        raise TraceError(f"{path} is not a readable .pt file: {_words(error)}") from error
    try:
        return _plain(found)
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    except (RuntimeError, TypeError, ValueError, RecursionError) as error:  # a tensor without values, such as on meta
        raise TraceError(f"{path} holds what cannot be read as arrays: {_words(error)}") from error


def _words(error: Exception) -> str:
    """The first line of what an exception says, or its kind."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _plain(value: Any) -> Any:
    import torch

    if isinstance(value, torch.Tensor):
        return _array(value)
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _array(tensor: Any) -> Any:
    import ml_dtypes
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    if tensor.is_floating_point() and tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        raise TraceError(f"a tensor is {tensor.dtype}; dump it as bfloat16, float16, float32 or float64")
    return tensor.numpy()
