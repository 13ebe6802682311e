"""Which keys a token attends to: by its place, by a mask of any form, and by scores that an additive mask made low."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

# Additive masks use the smallest number of the dtype instead of -inf: whatever lies in its lower half is masked. Some
# models scale it with the scores: beyond a 64th of it, since heads have fewer than 64 * 64 dimensions to scale by. That
# is a score in float16, but none in wider dtypes.
_MASKED, _SCALED = 0.5, 1.0 / 64.0


@dataclass(frozen=True, slots=True)
class Reach:
    """The keys that tokens of a call attend to by their place alone, where no mask says which.

    Attributes:
        first: which of the keys is that of the first token of the call.
        window: how many keys a token sees, its own included; None: all up to its own.
    """

    first: int = 0
    window: int | None = None

    def hides(self, tokens: Tensor, n_keys: int) -> Tensor:
        """Return [token, key], whether the tokens with these places in the call do not see a key."""
        own, keys = self.first + tokens[:, None], torch.arange(n_keys, device=tokens.device)[None, :]
        hidden = keys > own
        return hidden if self.window is None else hidden | (keys <= own - self.window)


def as_tensor(mask: object, n_rows: int, query: Tensor) -> Tensor | None:
    """Return a mask of the attention interface as a tensor that broadcasts to [row of the batch, head, token, key];
    None: there is none, or it has a form of which nothing is known.

    `query` is [row of the batch, head, token, dim]. flex attention is given blocks of keys and a function of places.
    Kernels that know the places of tokens by themselves are given [row of the batch, key], which keys are no padding.
    """
    if isinstance(mask, Tensor):
        return mask.bool()[:, None, None, :] if tells_padding(mask, n_rows) else mask if mask.ndim <= 4 else None
    return _of_blocks(mask, query) if hasattr(mask, "mask_mod") and hasattr(mask, "to_dense") else None


def tells_padding(mask: object, n_rows: int) -> bool:
    """Whether a mask tells which keys are no padding, [row of the batch, key], and nothing of places."""
    return isinstance(mask, Tensor) and mask.ndim == 2 and len(mask) == n_rows and not mask.is_floating_point()


def _of_blocks(mask: Any, query: Tensor) -> Tensor:
    """What the kernel of flex attention makes of a `BlockMask`: blocks that are not listed are hidden, whatever its
    function says."""
    from torch.nn.attention.flex_attention import create_mask

    *of_rows, n_tokens, n_keys = mask.shape
    n_rows, n_heads = (*of_rows, 1, 1)[:2]
    with torch._C.DisableTorchFunction():
        seen = create_mask(mask.mask_mod, n_rows, n_heads, n_tokens, n_keys, device=str(query.device))
        of_tokens, of_keys = mask.BLOCK_SIZE
        blocks = mask.to_dense().bool().repeat_interleave(of_tokens, -2).repeat_interleave(of_keys, -1)
        return torch.as_tensor(seen & blocks[..., :n_tokens, :n_keys])


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


__all__ = ["Reach", "as_tensor", "biases", "hide_masked", "hide_scaled", "least_score", "tells_padding"]
