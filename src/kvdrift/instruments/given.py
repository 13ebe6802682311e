"""Attention whose scores do not follow from queries and keys: are those of both passes made by the same function?

Something unknown may be done to the products of queries and keys: a bias by position is added, they are capped. Then
attention is replayed from the scores that its softmax got, and the scores of the passes are compared with each other.
Whatever is added by position is the same in both, so that they differ by what their products differ by, times the
slope of what is done to them, and by rounding. The slope is fitted to prefill, head by head; where it is not the same
for all keys, as under a cap, it lies between 0 and the usual scale, so that the difference of the products counts once
more as what may be left.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.replay.attention import Floats, Operands, probabilities_of, products_with_keys
from kvdrift.vocabulary.precision import PRODUCT_ROUNDINGS

# A key with less weight than this in both passes takes no part: a mask may have left it a finite score.
_NO_WEIGHT = 2.0**-40


class ScoreCheck(NamedTuple):
    """What scores of decode differ by from those of prefill over what they may, in the head with most of it, and the
    smallest relative error of the scores of a head that is beyond that for sure."""

    over: float
    least: float


def compare_scores(prefill: Operands, decode: Operands, unit: float) -> ScoreCheck | str:
    """Compare the given scores of both passes at one token, or say why they cannot be compared.

    `unit` is the coarsest roundoff in which scores may be kept on their way. A NaN or an infinity is beyond any bound.
    """
    seen = [_seen(operands) for operands in (prefill, decode)]
    if set(seen[0]) != set(seen[1]) or prefill.query.shape != decode.query.shape:
        return "the passes do not see the same keys"
    at = [np.array([found[slot] for slot in sorted(found)], dtype=np.intp) for found in seen]
    raw = [_raw(operands, index) for operands, index in zip((prefill, decode), at, strict=True)]
    scores = [_scores(operands)[:, index] for operands, index in zip((prefill, decode), at, strict=True)]
    weights = [_weights(operands)[:, index] for operands, index in zip((prefill, decode), at, strict=True)]
    live = ~((weights[0] <= _NO_WEIGHT) & (weights[1] <= _NO_WEIGHT))
    usual = prefill.query.shape[1] ** -0.5
    x, y = _centred(raw[0], live), _centred(scores[0], live)
    along = np.sum(x * x, axis=1, keepdims=True)
    slope = np.divide(np.sum(x * y, axis=1, keepdims=True), along, out=np.zeros_like(along), where=along > 0.0)
    steepest = np.maximum(np.abs(slope), usual)
    moved = _centred(raw[1] - raw[0], live)
    left = _centred(scores[1] - scores[0], live) - slope * moved
    size = np.zeros_like(left)
    for products, given, operands, index in zip(raw, scores, (prefill, decode), at, strict=True):
        terms = products_with_keys(operands.query**2, operands.keys**2, operands)[:, index]
        size = np.maximum(size, np.sqrt(given**2 + steepest**2 * (products**2 + terms)))
    allowed = PRODUCT_ROUNDINGS * unit * _norm(np.where(live, size, 0.0)) + _norm(steepest * moved)
    over = np.divide(_norm(left), allowed, out=np.zeros_like(allowed), where=allowed > 0.0)
    long = _norm(y)
    least = np.divide(2.0 * allowed, long, out=np.full_like(allowed, np.inf), where=long > 0.0)
    return ScoreCheck(float(np.nan_to_num(over, nan=np.inf).max(initial=0.0)), float(np.median(least)))


def _scores(operands: Operands) -> Floats:
    assert operands.scores is not None
    return operands.scores


def _seen(operands: Operands) -> dict[int, int]:
    """The place of each slot that some head sees."""
    places = np.flatnonzero(~np.isneginf(_scores(operands)).all(axis=0))
    return {int(operands.slots[place]): int(place) for place in places}


def _raw(operands: Operands, at: NDArray[np.intp]) -> Floats:
    return products_with_keys(operands.query, operands.keys, operands)[:, at]


def _weights(operands: Operands) -> Floats:
    return probabilities_of(operands, _scores(operands))


def _centred(values: Floats, live: NDArray[np.bool_]) -> Floats:
    """Values [head, key] of the live keys less their mean in each head, 0 at the others."""
    kept = np.where(live, values, 0.0)
    mean = kept.sum(axis=1, keepdims=True) / np.maximum(live.sum(axis=1, keepdims=True), 1)
    return np.asarray(np.where(live, kept - mean, 0.0))


def _norm(values: Floats) -> Floats:
    return np.asarray(np.sqrt(np.sum(values * values, axis=1)))


__all__ = ["ScoreCheck", "compare_scores"]
