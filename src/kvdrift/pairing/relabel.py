"""Keys of attention rows whose order one side changed where nobody can see it: inside its attention function.

Attention does not know an order of keys. A function that permutes keys, values and mask together hands the same context
on, while its scores and probabilities stand in another order than the cache slots that they are labelled with. Such a
row is brought back into order, but only if the context agrees: a permutation that does harm stays as it was recorded.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.kernels import as_floats
from kvdrift.trace.model import Array

# Rows that differ by less than this share of their norm are in the same order: rounding does not permute keys.
_GROSS = 1.0 / 16.0
# What putting the keys in order must at least remove of the difference.
_LEFT_MOST = 1.0 / 8.0
# Combinations of heads that are tried. Of a thousand rows of 17 keys and 4 heads with noise of bfloat16 the first alone
# leaves 136 out of order, the first four none.
_TRIES = 16
# A masked score, among the others: below all of them, and finite.
_BELOW = 2.0

Order = NDArray[np.intp]


def order_of_keys(prefill: Array, decode: Array) -> Order | None:
    """Return the order in which `decode` [head, key] has to be read to agree with `prefill`, both of scores.

    None if the rows are in the same order already, or if no order makes them agree. Keys are matched by a random
    combination of their heads, in which rounding lets keys of nearly equal combinations swap places; so the best of
    several is taken. Keys of nearly equal scores in all heads may stay swapped.
    """
    if prefill.shape != decode.shape or prefill.ndim != 2 or prefill.shape[1] < 2:
        return None
    if prefill.dtype == decode.dtype and prefill.tobytes() == decode.tobytes():
        return None
    first, second = as_floats(prefill), as_floats(decode)
    if _is_near(first, second):
        return None
    if np.isnan(first).any() or np.isnan(second).any() or (first == np.inf).any() or (second == np.inf).any():
        return None
    seen = np.isfinite(first), np.isfinite(second)
    lowest = min(np.min(first, initial=0.0, where=seen[0]), np.min(second, initial=0.0, where=seen[1]))
    norm = float(np.linalg.norm(first[seen[0]]))
    first, second = (
        np.where(finite, rows, _BELOW * lowest - 1.0) for finite, rows in zip(seen, (first, second), strict=True)
    )
    apart = float(np.linalg.norm(second - first))
    if not apart > _GROSS * norm:
        return None
    found, left = None, _LEFT_MOST * apart
    for weights in np.random.default_rng(0).standard_normal((_TRIES, first.shape[0])):
        order = np.empty(first.shape[1], dtype=np.intp)
        order[np.argsort(weights @ first)] = np.argsort(weights @ second)
        if (rest := float(np.linalg.norm(second[:, order] - first))) < left:
            found, left = order, rest
    return found


def are_apart(prefill: Array, decode: Array) -> bool:
    """Whether values of one shape differ by more than rounding may; never where one of them is not finite."""
    if prefill.dtype == decode.dtype and prefill.tobytes() == decode.tobytes():
        return False
    first, second = as_floats(prefill), as_floats(decode)
    return bool(np.isfinite(first).all() and np.isfinite(second).all() and not _is_near(first, second))


def _is_near(first: NDArray[np.float64], second: NDArray[np.float64]) -> bool:
    """Whether rows with the same keys masked differ by no more than rounding may: nearly all do."""
    finite = np.isfinite(first)
    if not np.array_equal(finite, np.isfinite(second)):
        return False
    if finite.all():  # a mask takes as long as all the rest
        values, apart = first.ravel(), (second - first).ravel()
    else:
        values = first[finite]
        apart = second[finite] - values
    return float(apart @ apart) <= _GROSS**2 * float(values @ values)


def agree(prefill: Array, decode: Array) -> bool:
    """Whether two contexts are the same to half of the digits of their dtype."""
    if prefill.shape != decode.shape or prefill.dtype != decode.dtype:
        return False
    first, second = prefill.astype(np.float64), decode.astype(np.float64)
    least = math.sqrt(float(ml_dtypes.finfo(prefill.dtype).eps))  # type: ignore[no-untyped-call]
    return bool(np.linalg.norm(second - first) <= least * np.linalg.norm(first))
