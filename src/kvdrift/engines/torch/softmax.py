"""Which softmax of an attention call weighs its keys.

A kernel may call softmax on something else than scores: one that attends to spans of keys apart may take the weights of
its merge from the softmax of their log-sums, one column a span. What the call returned decides: it is the values, each
times the weight of its key.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# No kernel cuts its keys into more spans than this: flash decoding and its relatives stop at 128. A softmax over as
# many columns as there are keys, and more than these, is that of the scores.
MOST_SPANS = 128
# A context that the weights do not give up to this share of its size is another one: roundings of half precision are
# sixteen times smaller.
_OTHER = 2.0**-4
# How much nearer the context must be to the weights of the operands than to those that were seen.
_NEARER = 4.0
# Scores that are no further apart than this share of their spread over the keys are the same: the log-sum of a span is
# the score of its best key only where that key has nearly all of the weight, and in all heads.
_SAME_SCORE = 2.0**-6


def weighs_keys(
    scores: Tensor,
    probs: Tensor,
    derive: Callable[[], tuple[Tensor, Tensor] | None],
    values: list[Tensor],
    context: list[Tensor],
) -> bool:
    """Return whether the softmax of `scores` weighed the keys of the call that made `context` of `values`.

    With as many columns as keys, or more, it did unless the weights that follow from the operands give the context and
    these do not. With fewer columns it did if each column is the score of a key, and if the weights of all keys do not
    give the context better: that is a kernel which leaves keys out. Where the operands give no weights, or where a NaN
    or an infinity takes part, what was seen is believed.

    Args:
        scores: what went into softmax, [row, head, column].
        probs: what came out of it, of the same shape.
        derive: computes the scores and probabilities that follow from the operands of the call, [row, head, key].
        values: for each part of the rows, those of one sequence after another, [kv head, key, dim].
        context: what the call returned, for each of the same parts, [row, head, dim].
    """
    keys = values[0].shape[1]
    few = probs.shape[-1] < keys
    seen = math.inf if few else _distance(probs[..., :keys], values, context)
    if not seen > _OTHER:
        return True
    derived = derive()
    if derived is None or derived[1].shape != (*probs.shape[:2], keys):
        return True
    right = _distance(derived[1], values, context)
    if few:
        spread = _by_key(scores.double(), probs.double(), derived[0].double())
        return spread is not None and not _distance(spread, values, context) > _NEARER * right
    return not (right <= _OTHER and seen > _NEARER * right)


def _distance(probs: Tensor, values: list[Tensor], context: list[Tensor]) -> float:
    """How far the context is from these weights times the values, relative to its size; NaN where one of them is.

    A factor common to a row of one head does not count: sinks may scale what attention computed behind the softmax.
    """
    first, off, size = 0, 0.0, 0.0
    for rows, wanted in zip(values, context, strict=True):
        part = probs[first : first + len(wanted)].double()
        first += len(wanted)
        heads = rows.double().repeat_interleave(part.shape[1] // rows.shape[0], dim=0)
        made = torch.einsum("rhk,hkd->rhd", part, heads)
        left, along = wanted.double().square().sum(-1), (made * wanted.double()).sum(-1).clamp(min=0.0)
        of_made = made.square().sum(-1)
        off += float((left - torch.where(of_made == 0.0, 0.0, along.square() / of_made)).clamp(min=0.0).sum())
        size += float(left.sum())
    return math.sqrt(off / size) if size > 0.0 else math.nan


def _by_key(scores: Tensor, probs: Tensor, derived: Tensor) -> Tensor | None:
    """Return the weights by key, [row, head, key], of columns that are the scores of keys, the same key in all heads.

    A key of no column has no weight. None if a column is that of no key, or two are those of one.
    """
    spread = torch.zeros_like(derived)
    for index, (row, wanted) in enumerate(zip(scores, derived, strict=True)):
        columns = torch.isfinite(row).all(0).nonzero()[:, 0]
        keys = torch.isfinite(wanted).all(0).nonzero()[:, 0]
        if not len(columns) or not len(keys):
            return None
        known = wanted[:, keys]
        off, nearest = (row[:, columns, None] - known[:, None, :]).square().mean(0).min(1)
        room = _SAME_SCORE * float((known - known.mean(1, keepdim=True)).square().mean().sqrt())
        if float(off.max().sqrt()) > room or len(set(nearest.tolist())) < len(columns):
            return None
        spread[index][:, keys[nearest]] = probs[index][:, columns]
    return spread


def weighs_others(probs: Tensor, keep: slice) -> bool:
    """Whether keys that belong to no token, those outside of `keep`, have a share of `probs` [row, head, key]."""
    sides = (probs[..., : keep.start], probs[..., keep.stop :]) if keep.stop - keep.start < probs.shape[-1] else ()
    return any(bool((of_no_token > 0.0).any()) for of_no_token in sides)
