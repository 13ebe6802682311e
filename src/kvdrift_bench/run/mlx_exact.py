"""Functions of mlx at float64 that have the accuracy of float32, computed by numpy while a context is open.

On a CPU `exp`, `sin`, `cos`, `tanh`, `erf` and what is made of them are approximations that are good to about 1e-7 at
every dtype. With numpy in their place, what two engines still differ by has another reason.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np
import torch
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_OF_ONE: dict[str, Callable[[Floats], Floats]] = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1.0 / np.sqrt(x),
    "sigmoid": lambda x: 1.0 / (1.0 + np.exp(-x)),
    "erf": lambda x: np.vectorize(math.erf, otypes=[np.float64])(x),
}


@contextmanager
def exact_functions() -> Iterator[None]:
    """Let numpy compute the functions of mlx at float64 while the context is open; other dtypes stay with mlx."""
    kept: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
        honest = getattr(owner, name)
        kept.append((owner, name, honest))

        def called(x: Any, *more: Any, **options: Any) -> Any:
            if not isinstance(x, mx.array) or x.dtype != mx.float64:
                return honest(x, *more, **options)
            options.pop("stream", None)
            return mx.array(function(np.array(x), *more, **options), dtype=mx.float64)

        setattr(owner, name, called)

    for name, function in _OF_ONE.items():
        put(mx, name, function)
    put(mx, "logaddexp", lambda x, y: np.logaddexp(x, np.array(y)))
    put(mx, "softmax", _softmax)
    put(mx.fast, "rope", _rope)
    put(mx.fast, "scaled_dot_product_attention", _attention)
    put(mx.fast, "rms_norm", _rms_norm)
    put(mx.fast, "layer_norm", _layer_norm)
    mx.disable_compile()  # what is compiled has taken the functions in
    try:
        yield
    finally:
        mx.enable_compile()
        for owner, name, honest in reversed(kept):
            setattr(owner, name, honest)


def _softmax(x: Floats, axis: int = -1, *, precise: bool = False) -> Floats:
    raised = np.exp(x - x.max(axis=axis, keepdims=True))
    found: Floats = raised / raised.sum(axis=axis, keepdims=True)
    return found


def _rope(
    x: Floats, dims: int, *, traditional: bool, base: float | None, scale: float, offset: Any, freqs: Any = None
) -> Floats:
    """Rotate `x` [..., position, dim] by frequencies that are made at float32, as transformers makes them."""
    if base is not None:
        exponents = torch.arange(0, dims, 2, dtype=torch.int64).to(torch.float32) / dims
        inverse = (1.0 / (base**exponents)).double().numpy()
    else:
        inverse = 1.0 / np.array(freqs)
    angles = ((np.arange(x.shape[-2]) + np.array(offset)) * scale)[:, None] * inverse
    cos, sin = np.cos(angles), np.sin(angles)
    half = dims // 2
    one, other = (slice(0, dims, 2), slice(1, dims, 2)) if traditional else (slice(0, half), slice(half, dims))
    out = x.copy()
    out[..., one] = x[..., one] * cos - x[..., other] * sin
    out[..., other] = x[..., one] * sin + x[..., other] * cos
    return out


def _attention(q: Floats, k: Any, v: Any, *, scale: float, mask: Any = None, sinks: Any = None) -> Floats:
    """Attend with `q` [batch, head, query, dim] to `k` and `v` [batch, kv head, key, dim].

    Raises:
        ValueError: there are sinks, which no architecture of the comparison has.
    """
    if sinks is not None:
        raise ValueError("attention with sinks has no exact form here")
    keys, values = np.array(k), np.array(v)
    copies = q.shape[1] // keys.shape[1]
    scores = scale * (q @ np.swapaxes(np.repeat(keys, copies, 1), -1, -2))
    if isinstance(mask, str):  # "causal"
        n_queries, n_keys = scores.shape[-2:]
        seen = np.arange(n_keys)[None] <= np.arange(n_keys - n_queries, n_keys)[:, None]
        scores = np.where(seen, scores, -np.inf)
    elif mask is not None:
        given = np.array(mask)
        scores = np.where(given, scores, -np.inf) if given.dtype == np.bool_ else scores + given
    found: Floats = _softmax(scores) @ np.repeat(values, copies, 1)
    return found


def _rms_norm(x: Floats, weight: Any, eps: float) -> Floats:
    out: Floats = x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return out if weight is None else np.multiply(out, np.array(weight))


def _layer_norm(x: Floats, weight: Any, bias: Any, eps: float) -> Floats:
    out = _rms_norm(x - x.mean(-1, keepdims=True), weight, eps)
    return out if bias is None else out + np.array(bias)
