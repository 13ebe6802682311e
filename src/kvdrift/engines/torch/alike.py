"""Tensors of float32 that meet lifted ones of float64: in one operation both have to be alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def made_alike(func: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of a torch function with all tensors of one dtype, None unless some are of float32 and some
    of float64.

    They are lifted to float64, such as weights that a kernel keeps in float32 for itself. A function that writes into
    its first argument gets the others as that one is: what is stored in float32 stays so.
    """
    with torch._C.DisableTorchFunction():
        tensors = [item for item in given if isinstance(item, Tensor)]
        if not {torch.float32, torch.float64} <= {item.dtype for item in tensors}:
            return None
        name = getattr(func, "__name__", "")
        writes = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        dtype = tensors[0].dtype if writes else torch.float64
        return tuple(
            item.to(dtype) if isinstance(item, Tensor) and item.dtype in (torch.float32, torch.float64) else item
            for item in given
        )


__all__ = ["made_alike"]
