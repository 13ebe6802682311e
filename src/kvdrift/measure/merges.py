"""Attention of one pass that is merged from parts in 16 bits: what it is off by, where nothing else is wrong.

At the finest rung such a kernel differs from the other pass by what 16 bits round, and no small change of the inputs
moves what it keeps in them. It is told by its numbers: attention of its own operands that is merged so has its context.
That is asked where the model itself has 16 bits, layer by layer; a context that no such way of merging gives is not
excused.
"""

from __future__ import annotations

import numpy as np

from kvdrift.instruments.replay import CapturedAttention, captured_of
from kvdrift.pairing.merges import Merges
from kvdrift.replay.attention import attend
from kvdrift.replay.merged import merged_contexts
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import HALF

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
    passes = captured_of(pair)
    for layer in sorted(passes[0].layers):
        if layer not in passes[1].layers and pair.mode != Mode.KV_ALIGNED:
            continue
        sizes = [
            _size(pair, captured if layer in captured.layers else passes[0], captured, layer) for captured in passes
        ]
        if all(size == 0.0 for size in sizes):
            continue
        known.note(layer, float(np.sum(sizes)))


def _size(pair: PassPair, of: CapturedAttention, captured: CapturedAttention, layer: int) -> float:
    """By what share of themselves the contexts of a pass are off from attention of the operands `of` a pass, if that is
    what parts in 16 bits make; 0 where they are not off, NaN where it is another error."""
    spec = pair.prefill.attention.get(layer)
    if spec is None or spec.is_biased:
        return np.nan
    largest = 0.0
    for position in pair.positions:
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
        if not any(np.linalg.norm(wrong - way) <= room for way in ways):
            return np.nan
        largest = max(largest, off / long)
    return largest


__all__ = ["note_merges"]
