"""Attention in 16 bits inside of a model of more: whether a kernel is behind casts, from what it was given and gave.

Kernels that exist for 16 bits alone are called with operands that are cast on the way in, and what they return is cast
back. So it lies on the grid of the narrower dtype, to the last element. Others round the operands, or the query that
was multiplied by the scale, and return what they summed up in float32: they compute attention of rounded operands. So
do kernels of 8 bits (`kvdrift.replay.eight_bits`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import ml_dtypes
import numpy as np

from kvdrift.replay.attention import Floats, Operands

# Numbers of bfloat16 are numbers of float16 as well, in its range; so the narrower significand comes first.
_NARROW: dict[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def kept_in(contexts: Iterable[Floats | None]) -> str | None:
    """Return the dtype of 16 bits that holds every number of all contexts exactly, None if there is none.

    Contexts of zeros say nothing, and NaN or infinity is held by none.
    """
    found = [context for context in contexts if context is not None]
    if not found or not all(np.isfinite(context).all() and context.any() for context in found):
        return None
    return next((name for name in _NARROW if all(_is_same(_to(context, name), context) for context in found)), None)


def rounded_operands(operands: Operands) -> Iterator[Operands]:
    """Yield the operands as kernels of 16 bits get them: all of them, queries and keys, or the query behind the scale
    rounded, where that changes anything."""
    scale = operands.attention.scale
    for name in _NARROW:
        query, keys = _to(operands.query, name), _to(operands.keys, name)
        yield operands.changed(query=query, keys=keys, values=_to(operands.values, name))
        yield operands.changed(query=query, keys=keys)
        yield operands.changed(query=query)
        if scale:
            scaled = _to(operands.query * scale, name) / scale
            yield operands.changed(query=scaled)
            yield operands.changed(query=scaled, keys=keys, values=_to(operands.values, name))


def _to(values: Floats, name: str) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return values.astype(_NARROW[name]).astype(np.float64)


def _is_same(first: Floats, second: Floats) -> bool:
    return bool(np.array_equal(first, second))


__all__ = ["kept_in", "rounded_operands"]
