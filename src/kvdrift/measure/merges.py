"""Attention of one pass that is merged from parts in 16 bits: what it is off by, where nothing else is wrong.

At the finest rung such a kernel differs from the other pass by what 16 bits round, and no small change of the inputs
moves what it keeps in them. It is told by its numbers: attention of its own operands that is merged so has its context.
That is asked where the model itself has 16 bits, layer by layer; a context that no such way of merging gives is not
excused.
"""

from __future__ import annotations

import numpy as np

from kvdrift.instruments.replay import CapturedAttention, captured_of, values_by_place
from kvdrift.pairing.merges import Merges
from kvdrift.replay.attention import attend
from kvdrift.replay.merged import contexts_of_rounded_scores, merged_contexts
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import HALF
from kvdrift.vocabulary.sites import Site

# An error that is no larger than this share of the context is one of float64.
_NEAR = 2.0**-36
# The share of an error that a way of merging leaves at most, at each position.
_LEFT_MOST = 1.0 / 8.0


def note_merges(known: Merges, pair: PassPair, native: str) -> None:
    """Note the layers of a pair at float64 in which one pass merges parts of the `native` dtype, and by what contexts
    are off there.

    With aligned inputs a kernel that shows none of its operands has those of prefill. NaN and infinity are
    another error.
    """
    if native not in HALF or pair.prefill.rung != "float64" or pair.decode.rung != "float64":
        return
    apart = contexts_apart(pair)
    if not apart:
        return
    passes = captured_of(pair)
    for layer in sorted(passes[0].layers & apart.keys()):
        if known.is_another(layer):
            return  # a mismatch begins here at the latest, and to look further costs much
        if layer not in passes[1].layers and pair.mode != Mode.KV_ALIGNED:
            continue
        sizes = [
            _size(pair, captured if layer in captured.layers else passes[0], captured, layer, apart[layer])
            for captured in passes
        ]
        if any(size != 0.0 for size in sizes):
            known.note(layer, float(np.sum(sizes)))
            if known.is_another(layer):
                return


def contexts_apart(pair: PassPair) -> dict[int, list[int]]:
    """The positions at which contexts of the passes differ, by layer: nothing is computed again at others."""
    sides = [values_by_place(trace, Site.ATTN_CTX) for trace in (pair.prefill, pair.decode)]
    found: dict[int, list[int]] = {}
    for (layer, position), first in sides[0].items():
        second = sides[1].get((layer, position))
        if layer is None or second is None or position not in pair.positions or first.size != second.size:
            continue
        right, wrong = (values.astype(np.float64).ravel() for values in (first, second))
        if not np.linalg.norm(wrong - right) <= _NEAR * np.linalg.norm(right):
            found.setdefault(layer, []).append(position)
    return found


def _size(
    pair: PassPair, of: CapturedAttention, captured: CapturedAttention, layer: int, positions: list[int]
) -> float:
    """By what share of themselves the contexts of a pass are off from attention of the operands `of` a pass, if that is
    what parts in 16 bits make; 0 where they are not off, NaN where it is another error."""
    spec = pair.prefill.attention.get(layer)
    if spec is None or spec.is_biased:
        return np.nan
    largest = 0.0
    for position in positions:
        context, operands = captured.context(layer, position), of.operands(layer, position, spec)
        if context is None:
            continue
        if isinstance(operands, str):
            return np.nan
        exact = attend(operands).context
        if context.size != exact.size:
            return np.nan
        wrong = context.reshape(exact.shape)
        off, long = float(np.linalg.norm(wrong - exact)), float(np.linalg.norm(exact))
        if off <= _NEAR * long:
            continue
        room = _LEFT_MOST * off
        ways = (way for dtype in sorted(HALF) for way in merged_contexts(operands, dtype))
        left = min((float(np.linalg.norm(wrong - way)) for way in ways), default=np.inf)
        scores = (way for dtype in HALF for way in contexts_of_rounded_scores(operands, dtype))
        if not left <= room or any(np.linalg.norm(wrong - way) <= max(left, room) for way in scores):
            return np.nan  # rounded scores are no parts, and where keys with weight are far apart both do the same
        largest = max(largest, off / long)
    return largest


__all__ = ["contexts_apart", "note_merges"]
