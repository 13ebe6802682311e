"""Whether a kernel was handed what attention was called with, up to one rounding and to what no score depends on.

Around their kernels, engines multiply the scale into the query, cast operands to 16 bits, or take the mean key off all
keys. Each of these rounds the operands once more. Scores of such operands are not those of the recorded query and keys,
and differ from them by far more than a sum in float32 does; a bound that allowed for it everywhere would hide a scale
that is wrong by a few parts in a thousand. Therefore it is asked of the numbers themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Products in float32 before the rounding to 16 bits: a few of their roundings may turn a tie.
_BEFORE = 2.0**-21
# Roundings of float32 and float64 operands: a product with the scale, a mean, a difference.
_ROUNDINGS = 8.0
# Keys are shifted if at least this share of their numbers is another one; a factor near one turns few of them.
_SHIFTED = 0.5
# A sum in float32 of a few hundred terms errs by a few roundings of |q| |k|.
_SUMMED = 2.0**-20
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


def are_of_rounded(
    scores: Tensor, query: Tensor, key: Tensor, scale: float, derive: Callable[[Tensor, Tensor], Tensor | None]
) -> bool:
    """Whether scores that were computed in float32 follow from operands rounded once more, and not from these.

    The query may have been multiplied by the scale and rounded, and the keys of a head smoothed, which is that their
    mean was subtracted, and rounded. A number that is added to a whole row of scores does not count. Operands of more
    than 16 bits have no such rounding.

    Args:
        scores: [row, head, key], as they went into softmax; of masked keys -inf or very small.
        query: [row, head, token, dim], as attention was called.
        key: [row, kv head, key, dim].
        scale: the factor of their product.
        derive: gives the scores of other operands, as `scores` are; None if it cannot.
    """
    if query.dtype.itemsize > 2 or key.dtype.itemsize > 2:
        return False
    sizes = query.double().norm(dim=-1).amax() * key.double().norm(dim=-1).amax()
    room = _SUMMED * abs(scale) * float(sizes)
    exact = derive(query, key)
    if exact is None or exact.shape != scores.shape or _is_near(scores, exact, room):
        return False
    return any(
        found is not None and _is_near(scores, found, room)
        for rounded, smooth in _rounded_once(query.double(), key.double(), scale, query.dtype)
        for found in (derive(rounded, smooth),)
    )


def _rounded_once(query: Tensor, key: Tensor, scale: float, native: torch.dtype) -> Iterator[tuple[Tensor, Tensor]]:
    """Query and keys in float64 as kernels round them: either of them, or both."""
    keys = [key]
    for dtype in dict.fromkeys((native, torch.bfloat16, torch.float16)):
        mean = key.mean(dim=2, keepdim=True)
        keys += [(key - mean).to(dtype).double(), (key - mean.to(dtype).double()).to(dtype).double()]
    queries = [query]
    for dtype in dict.fromkeys((native, torch.bfloat16, torch.float16)):
        queries += [(query * scale).to(dtype).double() / scale, query.to(dtype).double()]
    for rounded in queries:
        for smooth in keys:
            yield rounded, smooth


def _is_near(scores: Tensor, wanted: Tensor, room: float) -> bool:
    """Whether two sets of scores [row, head, key] differ by no more than `room`, but for one number a row and head."""
    seen = torch.isfinite(wanted) & torch.isfinite(scores)
    gap = torch.where(seen, scores.double() - wanted.double(), 0.0)
    gap = gap - gap.sum(-1, keepdim=True) / seen.sum(-1, keepdim=True).clamp(min=1)
    return bool((torch.where(seen, gap, 0.0).abs() <= room).all())
