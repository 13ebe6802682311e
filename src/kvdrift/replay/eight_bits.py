"""Attention whose operands have 8 bits: how a kernel may round them, and what attention of the rounded ones gives.

SageAttention (Zhang et al. 2024, arXiv:2410.02367) takes the mean of all keys of a call off each of them, and keeps
queries and keys as integers with one step for a row or a block of rows; FlashAttention 3 (Shah et al. 2024,
arXiv:2407.08608) keeps all operands in float8. Mean and steps belong to the call: those of a decode step come from the
keys so far, those of a prefill from all its tokens. So both are taken from the keys that a call really read.

The step of a block of queries comes from queries that nobody recorded. It is one number for a head, and is found by the
context that it gives. All other numbers follow from the operands: a factor, a mean of other keys or the step of another
block gives another context.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.replay.attention import Floats, Operands, attend, context_of, rows_per_head

_INT8_MOST, _FP8_MOST = 127.0, 448.0
# Blocks of keys are a power of two long, up to this one.
_MOST_KEYS = 256
# So often another way is looked for in vain.
_MOST_IN_VAIN = 4
# Keys of a tile.
_TILE = 64
# A query may be so many times shorter than the longest one of its block; so many steps up to each are looked at.
_SHORTER, _NEAREST = (2.0, 4.0, 16.0), 4

Numbers = Literal["int8", "float8", "float8 as it is"]
Values = Literal["as they are", "float16", "float8 by row", "float8 by channel", "float8 as it is"]
Weights = Literal["as they are", "float8"]


@dataclass(frozen=True, slots=True)
class Way:
    """How a kernel rounds its operands.

    Attributes:
        numbers: what queries and keys are kept in.
        is_smoothed: whether the mean key of the call is taken off all keys of a head.
        block: how many keys share a step; 1: each row has its own, 0: all keys of a call share one.
        in_blocks: whether queries of several tokens share a step.
        values: what values are kept in.
        weights: what weights of values are kept in, before they are divided by their sum.
    """

    numbers: Numbers
    is_smoothed: bool = False
    block: int = 1
    in_blocks: bool = False
    values: Values = "as they are"
    weights: Weights = "as they are"

    def of(self, operands: Operands, context: Floats) -> Operands:
        """Return the operands as a kernel gets them.

        A NaN or an infinity makes its row NaN, and under a mean its head.

        Args:
            operands: the recorded ones; their keys are all that the call read.
            context: [head * dim] or [head, dim], what the kernel gave: by it the step of a block of queries is found.
        """
        keys = operands.keys
        if self.is_smoothed and len(keys):
            keys = keys - keys.mean(axis=0, keepdims=True)
        rounded = operands.changed(
            query=_BY_ROW[self.numbers](operands.query),
            keys=_by_block(keys, self.block) if self.numbers == "int8" else _BY_ROW[self.numbers](keys),
            values=_OF_VALUES[self.values](operands.values),
            weighed=_WEIGHED[self.weights],
        )
        if not self.in_blocks or operands.is_alone or operands.attention.softcap is not None:
            return rounded
        plain = rounded.changed(query=operands.query)
        return rounded.changed(query=_with_fitted_steps(plain, context))


@dataclass(slots=True)
class Kernel:
    """What is known of a run's kernel of 8 bits: the ways that were found so far.

    A context that no way gives is a mismatch wherever it is. After a few of them no other way is looked for; the known
    ones are still tried.
    """

    known: list[Way] = field(default_factory=list)
    n_in_vain: int = 0

    def others(self, n_keys: int) -> Iterator[Way]:
        """Yield the ways that are not known, none where others were looked for in vain."""
        if self.n_in_vain < _MOST_IN_VAIN:
            yield from (way for way in ways(n_keys) if way not in self.known)

    def note(self, way: Way | None) -> None:
        """Note which way gave the contexts of both passes, None: none did."""
        if way is None:
            self.n_in_vain += 1
        elif way not in self.known:
            self.known.append(way)


def ways(n_keys: int) -> Iterator[Way]:
    """Yield the ways in which kernels round operands of a call with `n_keys` keys, simple ones first."""
    for number in ("float8", "float8 as it is"):
        own: Values = "float8 by row" if number == "float8" else "float8 as it is"
        for values in ("as they are", own, "float8 by channel"):
            yield Way(number, values=values)
    blocks = [1, 0, *(size for size in (2**n for n in range(2, 9)) if size < min(n_keys, _MOST_KEYS + 1))]
    for block in blocks:
        for is_smoothed in (False, True):
            for in_blocks in (False, True):
                for values in ("as they are", "float16", "float8 by channel", "float8 by row"):
                    yield Way("int8", is_smoothed, block, in_blocks, values)
                for values in ("float8 by channel", "float8 by row"):
                    yield Way("int8", is_smoothed, block, in_blocks, values, "float8")


def _to_int8(rows: Floats) -> Floats:
    return _integers(rows, _step(np.abs(rows).max(axis=-1, keepdims=True, initial=0.0), _INT8_MOST))


def _by_block(rows: Floats, block: int) -> Floats:
    """Rows [slot, head, dim] as integers, with one step for a head and `block` slots."""
    size = block or max(1, len(rows))
    largest = np.abs(rows).max(axis=2, initial=0.0)
    starts = np.arange(0, max(1, len(rows)), size)
    most = np.maximum.reduceat(largest, starts, axis=0).repeat(size, axis=0)[: len(rows)] if len(rows) else largest
    return _integers(rows, _step(most[:, :, None], _INT8_MOST))


def _integers(rows: Floats, step: NDArray[np.float32]) -> Floats:
    return np.asarray(np.rint(_over(rows, step)).astype(np.float64) * step)


def _to_fp8(rows: Floats, axis: int = -1) -> Floats:
    step = _step(np.abs(rows).max(axis=axis, keepdims=True, initial=0.0), _FP8_MOST)
    return _cast_to_fp8(_over(rows, step).astype(np.float64)) * step


def _cast_to_fp8(rows: Floats) -> Floats:
    with np.errstate(invalid="ignore"):
        return np.clip(rows, -_FP8_MOST, _FP8_MOST).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def _to_float16(rows: Floats) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return rows.astype(np.float16).astype(np.float64)


def _step(largest: Floats, most: float) -> NDArray[np.float32]:
    """The step of rows whose largest numbers are these, in float32 as kernels compute it."""
    return np.asarray(largest.astype(np.float32) / np.float32(most))


def _over(rows: Floats, step: NDArray[np.float32]) -> NDArray[np.float32]:
    wide = rows.astype(np.float32)
    return np.asarray(np.divide(wide, step, out=np.zeros_like(wide), where=step != 0.0))


def _weighed_in_fp8(probs: Floats) -> Floats:
    """Weights [head, slot] in float8, as tiles of keys are weighed one after the other: each beside the largest score
    of its tile and those before, with 448 for the largest."""
    starts = np.arange(0, probs.shape[1], _TILE)
    if not len(starts):
        return probs
    largest = np.maximum.accumulate(np.maximum.reduceat(probs, starts, axis=1), axis=1)
    peaks = largest.repeat(_TILE, axis=1)[:, : probs.shape[1]]
    weights = np.divide(probs, peaks, out=np.zeros_like(probs), where=peaks > 0.0)
    return np.asarray(_cast_to_fp8(_FP8_MOST * weights) / _FP8_MOST * peaks)


_WEIGHED: dict[str, Callable[[Floats], Floats] | None] = {"as they are": None, "float8": _weighed_in_fp8}
_BY_ROW: dict[str, Callable[[Floats], Floats]] = {"int8": _to_int8, "float8": _to_fp8, "float8 as it is": _cast_to_fp8}
_OF_VALUES: dict[str, Callable[[Floats], Floats]] = {
    "as they are": lambda values: values,
    "float16": _to_float16,
    "float8 by row": _to_fp8,
    "float8 by channel": lambda values: _to_fp8(values, axis=0),
    "float8 as it is": _cast_to_fp8,
}


def _with_fitted_steps(operands: Operands, context: Floats) -> Floats:
    """Return the query [head, dim] as integers whose step, one for each head, is that of a longer query: the one that
    comes nearest to the context, of those that do to first order in what rounding changes."""
    attended = attend(operands)
    if context.size != attended.context.size:
        return operands.query
    wanted = context.reshape(attended.context.shape)
    keys, values = rows_per_head(operands.keys, operands), rows_per_head(operands.values, operands)
    tried = []
    for head, query in enumerate(operands.query):
        probs = attended.probs[head]
        seen = probs > 0.0
        weighed = probs[seen, None] * keys[head][seen]
        moved = values[head][seen].T @ weighed - np.outer(attended.context[head], weighed.sum(axis=0))
        tried.append(_fitted(query, operands.attention.scale * moved, wanted[head] - attended.context[head]))
    best, least = operands.query.copy(), np.full(len(tried), np.inf)
    for queries in np.stack(tried, axis=1):  # one for each head at once: heads do not know each other
        left = np.linalg.norm(context_of(operands.changed(query=queries)) - wanted, axis=1)
        best, least = np.where((left < least)[:, None], queries, best), np.minimum(left, least)
    return best


def _fitted(query: Floats, moved: Floats, left: Floats) -> Floats:
    """Return `query` [dim] as integers times some steps [step, dim] for which `moved` [dim of values, dim] times what
    rounding changes is near to `left` [dim of values].

    What is left of a large change to first order says little of it, so that some steps are those of small changes.
    """
    n_steps = len(_SHORTER) * _NEAREST
    least = float(np.abs(query).max(initial=0.0)) / _INT8_MOST
    if not (least > 0.0 and np.isfinite(moved).all() and np.isfinite(left).all()):
        return np.tile(query, (n_steps, 1))
    sizes, signs = np.abs(query), np.sign(query)
    # Where the step grows beyond |q| / (n - 1/2), the integer of an element falls from n to n - 1.
    counts = np.rint(sizes / least).astype(np.int64)
    edges = np.concatenate([size / (np.arange(1, n + 1) - 0.5) for size, n in zip(sizes, counts, strict=True)])
    which = np.arange(len(query)).repeat(counts)
    order = np.argsort(edges, kind="stable")
    order = order[(edges[order] > least) & (edges[order] < _SHORTER[-1] * least)]
    edges, which = edges[order], which[order]
    first = moved @ (signs * counts)
    made = np.cumsum(np.vstack([first, -(moved[:, which] * signs[which]).T]), axis=0)  # of integers times a step of 1
    lower, upper = np.concatenate([[least], edges]), np.concatenate([edges, [_SHORTER[-1] * least]])
    wanted, long = left + moved @ query, np.sum(made**2, axis=1)
    steps = np.clip(np.divide(made @ wanted, long, out=lower.copy(), where=long > 0.0), lower, upper)
    off = np.sum((steps[:, None] * made - wanted) ** 2, axis=1)
    found = []
    for most in _SHORTER:
        nearest = np.argsort(np.where(lower <= most * least, off, np.inf), kind="stable")[:_NEAREST]
        found += [nearest[min(n, len(nearest) - 1)] for n in range(_NEAREST)]
    middle = 0.5 * (lower[found] + upper[found])
    return np.asarray(signs * np.rint(sizes / middle[:, None]) * steps[found][:, None])


__all__ = ["Kernel", "Way", "ways"]
