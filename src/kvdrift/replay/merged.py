"""Attention that is merged from parts of its keys, whose results are kept in 16 bits until then.

Kernels for one token divide the keys among blocks of threads. Each part gives its context and the logarithm of the sum
of its weights, or the sum itself beside the largest score, and a second kernel merges them (Flash-Decoding). What is
stored in between may have 16 bits. No small change of the inputs shows that: a change has to move a number from one
step of its grid to the next. It is computed here as such kernels do, for the ways in which keys are divided.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import ml_dtypes
import numpy as np

from kvdrift.replay.attention import Floats, Operands, rows_per_head, visible

_HALF: dict[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
_MOST_PARTS = 16
_LOG2_E = 1.4426950408889634
Cuts = tuple[int, ...]


def merged_contexts(operands: Operands, dtype: str) -> Iterator[Floats]:
    """Yield the contexts [head, dim] of attention whose parts are kept in a `dtype` of 16 bits, one for each way.

    A sink takes its part where the parts are merged. Nothing where a visible key is not finite.
    """
    scores = _scores(operands)
    if scores is None:
        return
    values = rows_per_head(operands.values, operands)[:, np.isfinite(scores[0])]
    scores = scores[:, np.isfinite(scores[0])]
    for cuts in _divisions(scores.shape[1]):
        yield from _of_parts(scores, values, cuts, _HALF[dtype], _sinks(operands))


def contexts_of_rounded_scores(operands: Operands, dtype: str) -> Iterator[Floats]:
    """Yield the contexts [head, dim] of attention whose scores are rounded to a `dtype` of 16 bits, behind the scale or
    in front of it: with one key for each part, these would be merged from parts as well."""
    scores, scale = _scores(operands), operands.attention.scale
    if scores is None:
        return
    sinks = _sinks(operands)[:, None]
    values = rows_per_head(operands.values, operands)[:, np.isfinite(scores[0])]
    scores = scores[:, np.isfinite(scores[0])]
    for by in (1.0, scale):
        with np.errstate(over="ignore", invalid="ignore"):
            kept = (scores / by).astype(_HALF[dtype]).astype(np.float64) * by
        top = np.maximum(kept.max(axis=1, keepdims=True), sinks)
        weights = np.exp(kept - top)
        total = weights.sum(axis=1, keepdims=True) + np.exp(sinks - top)
        yield np.einsum("hs,hsd->hd", weights / total, values)


def _sinks(operands: Operands) -> Floats:
    """The sink of each query head, -inf where there is none."""
    sinks = operands.attention.sinks
    return np.full(len(operands.query), -np.inf) if sinks is None else np.asarray(sinks, dtype=np.float64)


def _scores(operands: Operands) -> Floats | None:
    """The scores [head, slot] of one query in the order of slots, with -inf for what is not seen."""
    attention = operands.attention
    seen = visible(operands)
    order = np.argsort(operands.slots, kind="stable")
    if not seen.any() or not np.array_equal(order, np.arange(len(order))):
        return None
    keys = rows_per_head(operands.keys, operands)
    raw = attention.scale * np.einsum("hd,hsd->hs", operands.query, keys)
    if attention.softcap is not None:
        raw = attention.softcap * np.tanh(raw / attention.softcap)
    if attention.slopes is not None:
        raw = raw + np.asarray(attention.slopes)[:, None] * (operands.slots - operands.position)
    scores = np.where(seen, raw, -np.inf)
    return scores if np.isfinite(scores[:, seen]).all() else None


def _divisions(n_keys: int) -> list[Cuts]:
    """In which ways so many keys are divided: into parts that are as long as each other, but for a rest in the last one
    or one key more in each of the first; or into blocks of so many keys.

    None but the last part has a single key: its log-sum is its score, and scores in 16 bits are another matter.
    """
    found: dict[Cuts, None] = {}
    for n_parts in range(2, min(_MOST_PARTS, n_keys // 2) + 1):
        short, more = divmod(n_keys, n_parts)
        sizes = [short + 1] * more + [short] * (n_parts - more)
        found[(0, *np.cumsum(sizes).tolist())] = None
        found[(*range(0, n_keys, -(-n_keys // n_parts)), n_keys)] = None
    block = 2
    while block < n_keys:
        if n_keys // block < 4 * _MOST_PARTS:
            found[(*range(0, n_keys, block), n_keys)] = None
        block *= 2
    return list(found)


def _of_parts(scores: Floats, values: Floats, cuts: Cuts, kind: type, sinks: Floats) -> Iterator[Floats]:
    """The contexts of one division: contexts or log-sums in 16 bits, or both; or sums of weights and of values."""

    def cut(numbers: Floats) -> Floats:
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(numbers.astype(kind).astype(np.float64))

    parts = [(scores[:, a:b], values[:, a:b]) for a, b in pairwise(cuts)]
    top = np.stack([part.max(axis=1) for part, _ in parts])
    weights = [np.exp(part - peak[:, None]) for (part, _), peak in zip(parts, top, strict=True)]
    sums = np.stack([weight.sum(axis=1) for weight in weights])
    summed = np.stack([np.einsum("hs,hsd->hd", weight, rows) for weight, (_, rows) in zip(weights, parts, strict=True)])
    contexts, logs = summed / sums[..., None], top + np.log(sums)
    kept = cut(contexts)
    for told in (cut(logs), cut(logs * _LOG2_E) / _LOG2_E):
        yield _merged(contexts, told, sinks)
        yield _merged(kept, told, sinks)
    yield _merged(kept, logs, sinks)
    peaks = np.exp(top - top.max(axis=0))
    for of_values, of_weights in ((cut(summed), sums), (cut(summed), cut(sums)), (summed, cut(sums))):
        total = (peaks * of_weights).sum(axis=0) + np.exp(sinks - top.max(axis=0))
        yield np.asarray((peaks[..., None] * of_values).sum(axis=0) / total[:, None])


def _merged(contexts: Floats, logs: Floats, sinks: Floats) -> Floats:
    """Contexts [part, head, dim] weighed by their log-sums [part, head], and by what `sinks` [head] take of them."""
    top = np.maximum(logs.max(axis=0), sinks)
    weights = np.exp(logs - top)
    total = weights.sum(axis=0) + np.exp(sinks - top)
    return np.asarray((weights[..., None] * contexts).sum(axis=0) / total[:, None])


__all__ = ["contexts_of_rounded_scores", "merged_contexts"]
