"""Kernels of mlx that compute no finer than in float32, by their definition where float64 is asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx


def wide_norm(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The norm of mlx; in float64, in which its kernel computes no finer than in float32, by its definition."""
    if args[0].dtype != mx.float64 or len(args) != 3 or kwargs:
        return original(*args, **kwargs)
    x, weight, eps = args
    normal = x * mx.rsqrt(mx.mean(mx.square(x), axis=-1, keepdims=True) + mx.array(eps, dtype=mx.float64))
    return normal if weight is None else normal * weight.astype(mx.float64)


def wide_experts(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The products of mlx with chosen matrices, as its experts make them; in float64, which its kernel does not take,
    with the matrices taken out one by one."""
    if args[0].dtype != mx.float64 or len(args) != 2 or set(kwargs) - {"rhs_indices", "sorted_indices"}:
        return original(*args, **kwargs)
    return args[0] @ mx.take(args[1], kwargs["rhs_indices"], axis=0)


def wide_layer_norm(original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The layer norm of mlx; in float64 by its definition, for the same reason."""
    if args[0].dtype != mx.float64 or len(args) != 4 or kwargs:
        return original(*args, **kwargs)
    x, weight, bias, eps = args
    centred = x - mx.mean(x, axis=-1, keepdims=True)
    variance = mx.mean(mx.square(centred), axis=-1, keepdims=True)
    normal = centred * mx.rsqrt(variance + mx.array(eps, dtype=mx.float64))
    normal = normal if weight is None else normal * weight.astype(mx.float64)
    return normal if bias is None else normal + bias.astype(mx.float64)


__all__ = ["wide_experts", "wide_layer_norm", "wide_norm"]
