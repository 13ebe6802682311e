"""Whether a kernel was handed what attention was called with, up to one rounding and to what no score depends on.

Around their kernels, engines multiply the scale into the query, cast operands to 16 bits, or take the mean key off all
keys. Each of these rounds the operands once more. Scores of such operands are not those of the recorded query and keys,
and differ from them by far more than a sum in float32 does; a bound that allowed for it everywhere would hide a scale
that is wrong by a few parts in a thousand. Therefore it is asked of the numbers themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Products in float32 before the rounding to 16 bits: a few of their roundings may turn a tie.
_BEFORE = 2.0**-21
# Roundings of float32 and float64 operands: a product with the scale, a mean, a difference.
_ROUNDINGS = 8.0
# Keys are shifted if at least this share of their numbers is another one; a factor near one turns few of them.
_SHIFTED = 0.5
# Two scales that are the same number, written in two ways.
_EQUAL = 1e-12


def are_rounded(query: Tensor, key: Tensor, scale: float, seen: tuple[Tensor, Tensor, float]) -> bool:
    """Whether `seen` (query, key and scale of a kernel) are these operands rounded once more, and not the same bits.

    `query` is [row, head, token, dim] and `key` [row, kv head, key, dim]. A kernel's keys may be repeated for the heads
    of a group, or the query heads of a group stand in the place of the token axis. The query may be multiplied by what
    the scale is divided by; all keys of a head may be shifted by one vector, which adds the same number to all scores
    of a row. NaN and infinity are not explained.
    """
    seen_query, seen_key, seen_scale = seen
    if query.shape[2] == 1 and seen_query.shape[:2] == key.shape[:2]:
        query = query.reshape(*key.shape[:2], -1, query.shape[3])  # the heads of a group, where tokens have their axis
    if seen_query.shape != query.shape or seen_key.shape[2:] != key.shape[2:] or not seen_scale or not scale:
        return False
    if seen_key.shape[1] % key.shape[1]:
        return False
    key = key.repeat_interleave(seen_key.shape[1] // key.shape[1], dim=1)
    is_same_query, is_same_key = _is_same(query, seen_query), _is_same(key, seen_key)
    if is_same_query and (is_same_key or abs(seen_scale / scale - 1.0) > _EQUAL):
        return False  # the same bits, or a scale that no query makes up for
    return (is_same_query or _is_nearest(query.double() * (scale / seen_scale), seen_query)) and (
        is_same_key or _is_nearest(key.double(), seen_key) or _is_shifted(key, seen_key)
    )


def _is_same(values: Tensor, seen: Tensor) -> bool:
    return values.dtype == seen.dtype and torch.equal(values, seen)


def _is_nearest(exact: Tensor, seen: Tensor) -> bool:
    """Whether `seen` are the numbers of its dtype that lie nearest to `exact`."""
    found = seen.double()
    if seen.dtype.itemsize > 2:
        return bool(((found - exact).abs() <= _ROUNDINGS * torch.finfo(seen.dtype).eps * exact.abs()).all())
    nearest = [(exact * factor).to(seen.dtype) == seen for factor in (1.0, 1.0 - _BEFORE, 1.0 + _BEFORE)]
    return bool(torch.stack(nearest).any(0).all())


def _is_shifted(key: Tensor, seen: Tensor) -> bool:
    """Whether `seen` are the keys less one vector for each head, rounded: a vector exists that every key allows."""
    if key.shape[2] < 2 or float((key.double() != seen.double()).double().mean()) < _SHIFTED:
        return False
    shift = key.double() - seen.double()
    info = torch.finfo(seen.dtype)
    _, exponent = torch.frexp(seen.double())
    half = torch.ldexp(torch.full_like(shift, 0.25 * info.eps), exponent).clamp(min=info.smallest_normal * info.eps)
    narrow = seen.dtype.itemsize <= 2
    slack = _BEFORE * torch.maximum(key.double().abs(), shift.abs()) if narrow else (2.0 * _ROUNDINGS - 1.0) * half
    half = half + slack + (0.0 if narrow else _ROUNDINGS * info.eps * shift.abs())
    return bool(((shift - half).amax(2) <= (shift + half).amin(2)).all())
