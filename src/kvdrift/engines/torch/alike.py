"""Tensors that code keeps at a dtype of its own and that meet float64: in one operation both have to be alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_NARROW = {torch.float32, torch.bfloat16, torch.float16}


def made_alike(func: Any, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """Return the arguments of a torch function with all floating-point tensors of one dtype, None unless some are of
    float64 and some of a narrower one.

    They are lifted to float64, such as weights that a kernel keeps for itself. A function that writes into its first
    argument gets the others as that one is: what is stored narrow stays so.
    """
    with torch._C.DisableTorchFunction():
        tensors = [item for item in given if isinstance(item, Tensor) and item.is_floating_point()]
        dtypes = {item.dtype for item in tensors}
        if torch.float64 not in dtypes or not dtypes & _NARROW or not dtypes <= _NARROW | {torch.float64}:
            return None
        name = getattr(func, "__name__", "")
        writes = name.startswith("__i") or name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
        dtype = tensors[0].dtype if writes else torch.float64
        return tuple(
            item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item for item in given
        )


__all__ = ["made_alike"]
