"""Explanations of a context in which keys of little weight are left out: by a threshold, by their number, or by tiles.

A kernel that skips them (tiles far below the running maximum, the keys of a top-k, probabilities that a narrow dtype
flushes to zero) drops other keys in each head and at each step, so no span or mask tells it. One rule does for all
heads and steps: the weights, or the largest weight of each tile, that stay below one number are gone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from kvdrift.diagnosis.hidden import contexts_at_others
from kvdrift.diagnosis.model import NAMED, Candidate, Floats, Suspect
from kvdrift.replay.attention import Attended, Operands, attend, rows_per_head
from kvdrift.vocabulary.causes import Cause

# Thresholds that are tried, and lengths of tiles.
_MOST_THRESHOLDS, _TILES = 4096, (1, 2, 4, 8, 16, 32, 64, 128)
# Values of all keys and heads that are summed for one rule: more take longer than a name is worth (4 s for all rules).
_MOST_VALUES = 2**21
# What is fitted to the context fits a part of anything; only where it leaves next to nothing does it say something.
_NEARLY_ALL = 0.9
# Rules that explain more by less than this explain as much.
_ALIKE = 1e-9


class _Head(NamedTuple):
    """One head at one step: its keys in falling order of what the rule looks at, and what is left of the error if the
    first 0, 1, 2, ... of them are kept, [key + 1]."""

    looked_at: Floats
    left: Floats


def explain_dropped_weights(
    suspect: Suspect, operands: Operands, clean: Attended, wrong: Floats
) -> Iterator[Candidate]:
    """Yield the rule by which keys of little weight may have been left out of decode's context.

    Args:
        suspect: both passes at the layer of the failure.
        operands: what attention read at the first failing position.
        clean: what follows from it.
        wrong: the context of decode there [head, dim].
    """
    size = wrong.size * clean.probs.shape[1]
    if not 0 < size <= _MOST_VALUES:
        return
    others = list(contexts_at_others(suspect))[: _MOST_VALUES // size - 1]
    steps = [(operands, clean, wrong), *((found, attend(found), context) for found, context in others)]
    error = sum(float(((context - of.context) ** 2).sum()) for _, of, context in steps)
    if not 0.0 < error < np.inf or not np.isfinite(clean.probs).all():
        return
    best = (_NEARLY_ALL, "")
    for scaled in (True, False):
        for tile in _TILES:
            if tile > clean.probs.shape[1] // 2:
                break
            for relative in (True, False):
                heads = [head for step in steps for head in _heads(*step, tile=tile, relative=relative, scaled=scaled)]
                best = _better(best, _by_threshold(heads, error, tile, relative, scaled))
        heads = [head for step in steps for head in _heads(*step, tile=1, relative=True, scaled=scaled)]
        best = _better(best, _by_number(heads, error, scaled))
    if best[1]:
        explained = min(best[0], 1.0)
        yield Candidate(explained, Cause.WEIGHTS_DROPPED, f"decode leaves out {best[1]}", NAMED)


def _better(best: tuple[float, str], found: tuple[float, str]) -> tuple[float, str]:
    """The rule that explains more; of equals the first, which looks at single keys."""
    return found if found[0] > best[0] + _ALIKE else best


def _heads(
    operands: Operands, clean: Attended, wrong: Floats, *, tile: int, relative: bool, scaled: bool
) -> Iterator[_Head]:
    """The heads of a step: weights are looked at over the largest of the head where the rule is `relative`, and what is
    kept is `scaled` to a sum of one, beside what a sink takes."""
    values = rows_per_head(operands.values, operands)
    probs = clean.probs
    n_heads, n_keys = probs.shape
    starts = np.arange(0, n_keys, tile)
    tops = np.repeat(np.maximum.reduceat(probs, starts, axis=1), tile, axis=1)[:, :n_keys]
    looked_at = tops / probs.max(axis=1, keepdims=True) if relative else tops
    for head in range(n_heads):
        order = np.argsort(-looked_at[head], kind="stable")
        weights = np.concatenate([[0.0], np.cumsum(probs[head][order])])
        kept = np.concatenate([np.zeros((1, values.shape[2])), (probs[head][:, None] * values[head])[order].cumsum(0)])
        if scaled:
            total = weights + max(0.0, 1.0 - weights[-1])
            kept = np.divide(kept, total[:, None], out=np.zeros_like(kept), where=total[:, None] > 0.0)
        yield _Head(looked_at[head][order], ((kept - wrong[head]) ** 2).sum(axis=1))


def _by_threshold(heads: list[_Head], error: float, tile: int, relative: bool, scaled: bool) -> tuple[float, str]:
    """The threshold below which keys are gone that leaves least, if any is gone."""
    points = np.unique(np.concatenate([head.looked_at for head in heads]))
    points = points[:: -(-len(points) // _MOST_THRESHOLDS)]
    left = np.zeros(len(points))
    for head in heads:
        # Those that are no smaller than the point are kept.
        left += head.left[np.searchsorted(-head.looked_at, -points, side="right")]
    index = int(left.argmin())
    n_gone = sum(int((head.looked_at < points[index]).sum()) for head in heads)
    if not n_gone:
        return 0.0, ""
    below = float(max(head.looked_at[head.looked_at < points[index]].max(initial=0.0) for head in heads))
    what = "keys whose weight is" if tile == 1 else f"tiles of {tile} keys whose largest weight is"
    of = " of the largest of its head" if relative else ""
    text = f"{what} below a number between {below:.3g} and {points[index]:.3g}{of}{_rest(scaled)}"
    return 1.0 - float(left[index]) / error, text


def _by_number(heads: list[_Head], error: float, scaled: bool) -> tuple[float, str]:
    """The number of keys, the same in every head, that are kept: those of the largest weights."""
    most = max(len(head.looked_at) for head in heads)
    left = [sum(float(head.left[min(n, len(head.looked_at))]) for head in heads) for n in range(1, most)]
    if not left:
        return 0.0, ""
    number = int(np.argmin(left))
    text = f"all keys of a head but the {number + 1} of the largest weights{_rest(scaled)}"
    return 1.0 - left[number] / error, text


def _rest(scaled: bool) -> str:
    return "" if scaled else ", and does not scale up the others"
