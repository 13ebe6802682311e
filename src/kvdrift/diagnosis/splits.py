"""Explanations of a context whose scores are right: a span of keys lost or counted twice, values of another head."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import EXACT, Candidate, Floats, share
from kvdrift.replay.attention import Attended, Operands
from kvdrift.vocabulary.causes import Cause

# Spans begin and end at so many keys at most: at each where there are fewer, else at multiples of a power of two.
_MOST_CUTS = 64


def explain_splits(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield which span of keys is left out of the result, left out of its numerator alone, or counted twice.

    With p the probabilities, a span S of weight w = sum_S p and of result o = sum_S p v, the context c becomes
    (c - o) / (1 - w), c - o, or (c + o) / (1 + w).
    """
    values = operands.values.transpose(1, 0, 2)
    group = clean.probs.shape[0] // values.shape[0]
    each = clean.probs[:, :, None] * np.repeat(values, group, axis=0)  # [head, slot, dim]
    n_keys = each.shape[1]
    step = 1
    while n_keys / step > _MOST_CUTS:
        step *= 2
    cuts = sorted({*range(0, n_keys, step), n_keys})
    results = np.concatenate([np.zeros_like(each[:, :1]), np.cumsum(each, axis=1)], axis=1)[:, cuts]
    weights = np.concatenate([np.zeros((len(each), 1)), np.cumsum(clean.probs, axis=1)], axis=1)[:, cuts]
    best: dict[str, Candidate] = {}
    for i in range(len(cuts)):
        for j in range(i + 1, len(cuts)):
            if j - i == len(cuts) - 1:
                continue  # all keys are no span
            o, w = results[:, j] - results[:, i], (weights[:, j] - weights[:, i])[:, None]
            keys = f"the keys of the slots {operands.slots[cuts[i]]} to {operands.slots[cuts[j] - 1]}"
            left = np.where(w < 1.0 - 1e-12, 1.0 - w, 1.0)
            for form, cause, predicted, text in (
                ("lost", Cause.SPLIT_LOST, (clean.context - o) / left, f"decode does not merge the result of {keys}"),
                (
                    "half",
                    Cause.SPLIT_LOST,
                    clean.context - o,
                    f"decode merges the weights of {keys} without their values",
                ),
                ("twice", Cause.SPLIT_COUNTED_TWICE, (clean.context + o) / (1.0 + w), f"decode merges {keys} twice"),
            ):
                found = Candidate(share(clean.context, wrong, predicted), cause, text, EXACT)
                if form not in best or best[form].explained < found.explained:
                    best[form] = found
    yield from best.values()


def explain_value_heads(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield which kv head's values each query head is given, where its probabilities are right."""
    heads, kv_heads = clean.probs.shape[0], operands.values.shape[1]
    if kv_heads < 2:
        return
    made = np.einsum("hs,sgd->hgd", clean.probs, operands.values)
    mapping = np.argmin(((made - wrong[:, None]) ** 2).sum(axis=2), axis=1)
    right = np.arange(heads) // (heads // kv_heads)
    if np.array_equal(mapping, right):
        return
    tiled = np.array_equal(mapping, np.arange(heads) % kv_heads)
    text = f"query heads weigh the values of the kv heads {mapping.tolist()} instead of {right.tolist()}"
    cause = Cause.HEADS_TILED if tiled else Cause.HEAD_GROUP_WRONG
    yield Candidate(share(clean.context, wrong, made[np.arange(heads), mapping]), cause, text, EXACT)
