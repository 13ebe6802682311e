"""Attention kernels of an engine's own whose author lets their operands be seen.

A kernel that is no call of torch shows nothing. Called through `shown`, it is watched as torch's own attention is: what
it reads, and what it gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function

from kvdrift.errors import UsageError

# By which names a kernel may be told the factor of its products.
_SCALES = ("scale", "softmax_scale", "sm_scale")


class ShownKernel:
    """A kernel that may be called as before: `kernel(query, key, value, ...)`."""

    def __init__(self, kernel: Callable[..., Tensor]) -> None:
        self.kernel = kernel
        self.__name__ = getattr(kernel, "__name__", type(kernel).__name__)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        if torch._C._is_torch_function_mode_enabled():
            given = (query, key, value)
            return torch.as_tensor(handle_torch_function(self, given, *given, *args, **options))
        return self.kernel(query, key, value, *args, **options)


def shown(kernel: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a causal attention kernel whose operands kvdrift sees when it is called.

    Args:
        kernel: `kernel(query, key, value, ...)` attends to `key` and `value` [1, kv head, key, dim] with `query` [1,
            head, token, dim], of which the last token sees all keys, and returns [1, head, token, dim]. Products are
            multiplied by `scale=` (or `softmax_scale=`, `sm_scale=`), else by the root of 1 / dim.

    Raises:
        UsageError: it cannot be called.
    """
    if not callable(kernel):
        raise UsageError(f"shown() got {type(kernel).__name__}; pass a function kernel(query, key, value, ...)")
    return ShownKernel(kernel)


def scale_of(query: Tensor, options: dict[str, Any]) -> float:
    """By what a kernel multiplies the products of its queries and keys."""
    given = next((options[name] for name in _SCALES if options.get(name)), None)
    return float(query.shape[-1] ** -0.5 if given is None else given)


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """Which keys [token, key] each token sees, where the last one sees all."""
    tokens, keys = query.shape[2], key.shape[2]
    last = torch.arange(keys - tokens, keys, device=query.device)
    return torch.arange(keys, device=query.device)[None, :] <= last[:, None]


__all__ = ["ShownKernel", "causal_mask", "scale_of", "shown"]
