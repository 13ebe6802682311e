"""Scores that a pass computed in 16 bits and holds in more: compared as what they are.

Scores of a model of 16 bits come out in 16 bits where a matrix product makes them, and in float32 inside a fused
kernel. What is held in float32 afterwards is not told by its dtype, and is by its numbers: all of them lie on the grid
of 16 bits, or do before they were multiplied by the scale.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from kvdrift.trace.model import Array

_KINDS: dict[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# How near a number is to one of 16 bits that was multiplied by a scale in float32: two roundings and one of the scale.
_NEAR = 2.0**-22
# Fewer numbers may lie on the grid by chance: a float32 does so once in 2^13 or 2^16.
_FEWEST = 4


def at_fewer_bits(prefill: Array, decode: Array, native: str, scale: float) -> tuple[Array, Array, bool]:
    """Return scores of one dtype as numbers of the `native` dtype of 16 bits, if those of a pass are such numbers, or
    are those once they were divided by the `scale`; and whether that rounded one of them.

    Rows of 16 bits stay as they are, as do rows of few finite numbers, or with a NaN. Masked scores stay -inf.
    """
    if prefill.dtype != decode.dtype or prefill.dtype.itemsize <= 2:
        return prefill, decode, False
    kind = _KINDS[native]
    for by in dict.fromkeys((1.0, scale)):
        on_grid = [_is_on_grid(rows, kind, by) for rows in (prefill, decode)]
        if any(on_grid):
            first, second = (_narrow(rows, kind, by) for rows in (prefill, decode))
            return first, second, not all(on_grid)
    return prefill, decode, False


def _narrow(rows: Array, kind: type, scale: float) -> Array:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray((rows.astype(np.float64) / scale).astype(kind))


def _is_on_grid(rows: Array, kind: type, scale: float) -> bool:
    wide = rows.astype(np.float64) / scale
    if np.isnan(wide).any() or int((np.isfinite(wide) & (wide != 0.0)).sum()) < _FEWEST:
        return False
    near = _narrow(rows, kind, scale).astype(np.float64)
    told = np.isfinite(wide)
    room = 0.0 if scale == 1.0 else _NEAR
    return bool((np.abs(near[told] - wide[told]) <= room * np.abs(wide[told])).all())


__all__ = ["at_fewer_bits"]
