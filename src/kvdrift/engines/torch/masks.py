"""Which scores are those of keys that an additive mask hides."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

# Additive masks use the smallest number of the dtype instead of -inf: whatever lies in its lower half is masked. Some
# models scale it with the scores: beyond a 64th of it, since heads have fewer than 64 * 64 dimensions to scale by. That
# is a score in float16, but none in wider dtypes.
_MASKED, _SCALED = 0.5, 1.0 / 64.0


def hide_masked(scores: Tensor, dtype: torch.dtype) -> Tensor:
    """Return `scores` [..., key], with -inf where an additive mask of `dtype` hides the key; NaN stays."""
    if not dtype.is_floating_point:
        return scores
    return scores.masked_fill(scores < least_score(dtype), -torch.inf)


def hide_scaled(scores: Tensor, original: Tensor, probs: Tensor, dtype: torch.dtype) -> Tensor:
    """Hide what a mask of `dtype` hides that was scaled with wider scores, where the key has no probability at all.

    A NaN hides nothing and stays.

    Args:
        scores: [..., key], `original` with other masked keys hidden already.
        original: the same scores with the mask added.
        probs: their probabilities, of the same shape.
        dtype: of the mask.
    """
    least = float(torch.finfo(dtype).min) * _SCALED
    return scores.masked_fill((original < least) & (probs == 0.0), -torch.inf)


@cache
def least_score(dtype: torch.dtype) -> float:
    """The score below which a key is masked, in scores of `dtype`; wider ones may have got a mask of float32."""
    widest = torch.float32 if dtype == torch.float64 else dtype
    return float(torch.finfo(widest).min) * (_MASKED if widest == torch.float16 else _SCALED)


def biases(mask: Tensor) -> bool:
    """Whether an additive mask does more than to hide keys."""
    return bool(((mask != 0) & (mask > least_score(mask.dtype))).any())


__all__ = ["biases", "hide_masked", "hide_scaled", "least_score"]
