"""How large partial sums of a product become that is added term by term in the dtype of its result."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

# Results of a row from which on its root mean square strays little.
_MANY = 64


def of_partial_sums(reference: Floats, spread: Floats, n_terms: int) -> Floats:
    """Return the spread [row, out] of products that are added term by term in the dtype of their result.

    Partial sums are as large as the result where all terms have one sign, and as the spread where they have any; where
    the first term is the largest, all n of them are. An error is then sqrt(n / 3) roundings, each of them even from
    minus one to one. A row of few results strays further from that than a block of many, six standard deviations of its
    root mean square; results that are small beside others do not count among them. NaN and infinity go where the
    arithmetic takes them.

    Args:
        reference: [row, out], the exact results.
        spread: [row, out], the root of the sum of the squares of the terms of each.
        n_terms: how many terms each result has.
    """
    size = np.square(reference) + np.square(spread)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        counted = np.square(size.sum(-1, keepdims=True)) / np.square(size).sum(-1, keepdims=True)  # (Kish 1965)
    counted = np.maximum(np.nan_to_num(counted, nan=1.0, posinf=None), 1.0)
    strays = np.maximum(_strays(counted) / _strays(np.float64(_MANY)), 1.0)
    times = max(1.0, n_terms / 3.0) * np.square(strays)
    wide: Floats = np.sqrt((times - 1.0) * np.square(reference) + times * np.square(spread))
    return wide


def _strays(n_results: Floats | np.float64) -> Floats:
    """How many times its expectation the root mean square of so many normal errors is, six standard deviations out."""
    return np.asarray(1.0 + 6.0 / np.sqrt(2.0 * n_results))


__all__ = ["of_partial_sums"]
