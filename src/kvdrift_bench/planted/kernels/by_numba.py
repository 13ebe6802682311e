"""Kernels that numba compiles: plain loops in float32. Without numba they are functions that are never called."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

_ZERO = np.float32(0.0)


def attend(q: Any, k: Any, v: Any, mask: Any, scale: Any, odd: Any, out: Any) -> None:
    """Two passes over the keys. Operands are [head, token, dim], [kv head, key, dim] and a mask [token, key].

    `odd` makes head 1 of a single token forget its last key.
    """
    group = q.shape[0] // k.shape[0]
    for head in range(q.shape[0]):
        kv = head // group
        for row in range(q.shape[1]):
            n_keys = k.shape[1]
            if odd and head == 1 and q.shape[1] == 1:
                n_keys -= 1
            scores = np.empty(n_keys, np.float32)
            peak = np.float32(-3.0e38)
            for key in range(n_keys):
                total = _ZERO
                for dim in range(q.shape[2]):
                    total += q[head, row, dim] * k[kv, key, dim]
                scores[key] = total * scale + mask[row, key]
                peak = max(peak, scores[key])
            whole = _ZERO
            for key in range(n_keys):
                scores[key] = np.float32(math.exp(scores[key] - peak))
                whole += scores[key]
            for dim in range(v.shape[2]):
                total = _ZERO
                for key in range(n_keys):
                    total += scores[key] * v[kv, key, dim]
                out[head, row, dim] = total / whole


def multiply(x: Any, w: Any, skipped: Any, out: Any) -> None:
    """out [row, output] = x [row, inner] w [output, inner]^T; the last `skipped` of the inner axis are left out."""
    for row in range(x.shape[0]):
        for output in range(w.shape[0]):
            total = _ZERO
            for inner in range(w.shape[1] - skipped):
                total += x[row, inner] * w[output, inner]
            out[row, output] = total


@cache
def compiled(function: Callable[..., None]) -> Any:
    """Return a kernel of this module, compiled when it is first called and kept on disk from then on."""
    import numba

    return numba.njit(cache=True)(function)


__all__ = ["attend", "compiled", "multiply"]
