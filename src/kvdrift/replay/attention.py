"""Attention of one query token, in float64 and from its definition.

It is computed from captured operands. So it tests the arithmetic of a pass apart from the bytes that the pass was
given, and works on traces of any engine. Scores and their sizes are logits; contexts and their derivatives have the
unit of the values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from kvdrift.vocabulary.facts import AttentionSpec

Floats = NDArray[np.float64]
Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Operands:
    """What one decode step attends with. Query head h reads kv head h div (heads / kv heads).

    Attributes:
        query: [head, dim].
        keys: [slot, kv head, dim].
        values: [slot, kv head, dim].
        slots: [slot], the logical position of each row.
        position: the logical position of the query.
        attention: scale, softcap, window, slopes and sinks.
        tiled: the wrong mapping, kv head h mod (kv heads), for the catalogue of causes.
        seen: [slot], which keys are visible, where no window tells; None: those that the position and the window say.
        scores: [head, slot], what is weighed, with -inf for what is not seen, where no specification tells how it
            follows from the query and the keys; None: it follows from them.
        is_alone: whether the call had no other query.
        weighed: how the values are weighed: by probabilities of 8 bits, or None, by exact ones.
    """

    query: Floats
    keys: Floats
    values: Floats
    slots: Slots
    position: int
    attention: AttentionSpec
    tiled: bool = False
    seen: NDArray[np.bool_] | None = None
    scores: Floats | None = None
    is_alone: bool = True
    weighed: Callable[[Floats], Floats] | None = None

    def changed(self, **fields: object) -> Operands:
        """Return a copy with other fields."""
        return replace(self, **fields)  # type: ignore[arg-type]


@dataclass(frozen=True, slots=True)
class Attended:
    """The result of attention for one query token.

    Attributes:
        context: [head, dim].
        probs: [head, slot].
        raw: [head, slot], the scaled scores before softcap.
        magnitude: [head, dim], the sum of |p| |v|, by which rounding errors of the context are measured.
    """

    context: Floats
    probs: Floats
    raw: Floats
    magnitude: Floats


def attend(operands: Operands) -> Attended:
    """Compute attention for one query token in float64.

    A key that cannot be seen has probability 0, and a token that sees nothing has context 0. A NaN or an infinity of
    the query or of a visible key makes all probabilities of its head NaN. One of a value makes its element of the
    context NaN, even in a slot that cannot be seen.
    """
    raw, probs = weigh(operands)
    values = operands.values
    return Attended(context_of(operands, probs), probs, raw, sum_of_values(probs, np.abs(values), operands))


def context_of(operands: Operands, probs: Floats | None = None) -> Floats:
    """Return the context [head, dim] of `attend` alone, with its NaN.

    `probs` [head, slot] are the probabilities of this query and these keys; None computes them.
    """
    probs = weigh(operands)[1] if probs is None else probs
    probs = probs if operands.weighed is None else operands.weighed(probs)
    return sum_of_values(probs, operands.values, operands)


def weigh(operands: Operands) -> tuple[Floats, Floats]:
    """Return the scaled scores before softcap and the probabilities of `attend`, both [head, slot], with their NaN.

    A NaN in a key that cannot be seen stands in its raw score, and in no probability.
    """
    raw = operands.scores
    if raw is None:
        raw = operands.attention.scale * products_with_keys(operands.query, operands.keys, operands)
    return raw, probabilities_of(operands, raw)


def probabilities_of(operands: Operands, raw: Floats) -> Floats:
    """Return the probabilities [head, slot] of scaled scores before softcap [head, slot], with the NaN of those that
    can be seen."""
    attention = operands.attention
    scores = raw if operands.scores is None else operands.scores
    if operands.scores is None:
        scores = raw if attention.softcap is None else attention.softcap * np.tanh(raw / attention.softcap)
        if attention.slopes is not None:
            slopes = np.asarray(attention.slopes, dtype=np.float64)[:, None]
            scores = scores + slopes * (operands.slots - operands.position)
        scores = np.where(visible(operands), scores, -np.inf)
    sinks = np.full((len(scores), 1), -np.inf)
    if attention.sinks is not None:
        sinks = np.asarray(attention.sinks, dtype=np.float64)[:, None]
    top = np.maximum(scores.max(axis=1, keepdims=True, initial=-np.inf), sinks)
    with np.errstate(invalid="ignore"):
        weights = np.exp(scores - np.where(np.isneginf(top), 0.0, top))
        total = weights.sum(axis=1, keepdims=True) + np.exp(sinks - np.where(np.isneginf(top), 0.0, top))
    return np.asarray(np.divide(weights, total, out=np.zeros_like(weights), where=total != 0.0))


def visible(operands: Operands) -> NDArray[np.bool_]:
    """Return which slots the query may see, [slot]: none after itself, none that has left the window."""
    if operands.seen is not None:
        return operands.seen
    seen = operands.slots <= operands.position
    window = operands.attention.window
    if window is not None:
        seen &= operands.slots > operands.position - window
    return seen


def scale_direction(operands: Operands, attended: Attended) -> Floats:
    """Return the derivative of the context [head, dim] by the logarithm of the score scale; NaN as in the context.

    With p the probabilities and s the scores, d context / d log scale = sum_j p_j (s'_j - sum_i p_i s'_i) v_j, where
    s' = raw for plain scores and raw * (1 - tanh^2(raw / softcap)) under a softcap. A sink takes part in the sum of
    probabilities with s' = 0, so the formula holds for it as it stands.
    """
    slope = attended.raw
    if operands.attention.softcap is not None:
        slope = slope * (1.0 - np.tanh(attended.raw / operands.attention.softcap) ** 2)
    slope = np.where(attended.probs > 0.0, slope, 0.0)
    centred = slope - (attended.probs * slope).sum(axis=1, keepdims=True)
    return sum_of_values(attended.probs * centred, operands.values, operands)


def score_sizes(operands: Operands) -> Floats:
    """Return |scale| * sum |q_i k_i| [head, slot], NaN where the query or the key has one.

    One roundoff of this size is the unit in which an inner product errs (Higham, Accuracy and Stability of Numerical
    Algorithms, 2002, section 3.1).
    """
    sizes = products_with_keys(np.abs(operands.query), np.abs(operands.keys), operands)
    return np.asarray(abs(operands.attention.scale) * sizes)


def score_conditioning(operands: Operands, attended: Attended, sizes: Floats) -> float:
    """Return how far the context moves, in units of sum |p| |v|, if every score is off by its entry in `sizes`.

    A score that is off by e changes its probability by p * e, and through the sum all others of its head. Large scores
    thus make attention sensitive, whatever kernel computes it. The result is the root mean square over [head, dim]. It
    is NaN if an entry of a key with a probability above 0 is NaN; an element whose magnitude is 0 or NaN counts as 0.

    Args:
        operands: what was attended with.
        attended: the result of `attend` for them.
        sizes: [head, slot], in logits.
    """
    moved = np.where(attended.probs > 0.0, sizes, 0.0)
    moved = moved + (attended.probs * moved).sum(axis=1, keepdims=True)
    found = sum_of_values(attended.probs * moved, np.abs(operands.values), operands)
    share = np.divide(found, attended.magnitude, out=np.zeros_like(found), where=attended.magnitude > 0.0)
    return float(np.sqrt(np.mean(share**2)))


def context_spread(operands: Operands, attended: Attended) -> Floats:
    """Return what roundings inside attention move the context by, in units of one of them, [head, dim].

    It is the root of a sum of squares: of the terms p v, each of which may be rounded, and of what a score that is off
    by e_s does to the context, p_s e_s (v_s - context), where a score errs by its own size and by that of the terms of
    its inner product. NaN as in the context.
    """
    attention = operands.attention
    terms = products_with_keys(operands.query**2, operands.keys**2, operands)
    errors = attention.scale**2 * terms + attended.raw**2
    squares = attended.probs**2
    moved = np.where(attended.probs > 0.0, squares * errors, 0.0)
    found = sum_of_values(squares + moved, operands.values**2, operands)
    found = found - 2.0 * attended.context * sum_of_values(moved, operands.values, operands)
    squared = found + attended.context**2 * moved.sum(axis=1, keepdims=True)
    return np.asarray(np.sqrt(np.maximum(squared, 0.0)))


def products_with_keys(query: Floats, keys: Floats, operands: Operands) -> Floats:
    """Return the inner product of each head's `query` [head, dim] with the `keys` [slot, kv head, dim] that it reads,
    [head, slot]; NaN where one of the two has a NaN.

    Query heads that share a kv head are taken together: keys by query head are several times as large.
    """
    return _by_head(_by_kv_head(query, keys, operands) @ keys.transpose(1, 2, 0), operands)


def sum_of_values(weights: Floats, values: Floats, operands: Operands) -> Floats:
    """Return the `values` [slot, kv head, dim] that each head reads, summed with its `weights` [head, slot],
    [head, dim]; NaN where a weight or a value is NaN, whatever the weight is."""
    return _by_head(_by_kv_head(weights, values, operands) @ values.transpose(1, 0, 2), operands)


def _by_kv_head(by_head: Floats, rows: Floats, operands: Operands) -> Floats:
    """Rows [head, n] as [kv head, heads that read it, n]."""
    (heads, n), kv_heads = by_head.shape, rows.shape[1]  # n may be 0, where no key is left
    if operands.tiled:
        return by_head.reshape(heads // kv_heads, kv_heads, n).swapaxes(0, 1)
    return by_head.reshape(kv_heads, heads // kv_heads, n)


def _by_head(by_kv_head: Floats, operands: Operands) -> Floats:
    """The reverse of `_by_kv_head`."""
    ordered = by_kv_head.swapaxes(0, 1) if operands.tiled else by_kv_head
    return np.ascontiguousarray(ordered).reshape(ordered.shape[0] * ordered.shape[1], ordered.shape[2])


def rows_per_head(rows: Floats, operands: Operands) -> Floats:
    """Return [head, slot, dim]: the kv head that each query head reads."""
    heads, kv_heads = operands.query.shape[0], rows.shape[1]
    index = np.arange(heads)
    index = index % kv_heads if operands.tiled else index // (heads // kv_heads)
    return np.asarray(rows.transpose(1, 0, 2)[index])
