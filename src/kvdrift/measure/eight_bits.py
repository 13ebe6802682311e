"""Attention of operands of 8 bits in both passes: what contexts are off by, where nothing else is wrong.

Mean and steps of such a kernel belong to a call, so that a prefill and a decode step round the same key to different
numbers. At the finest rung the passes then differ by what 8 bits round, and few small changes of the inputs show it. It
is told by its numbers: attention of a pass's own operands, rounded in one way for both passes and all tokens of a
layer, has its context. A pass that computes finely is not excused, and neither is a context that no such way gives.
"""

from __future__ import annotations

import numpy as np

from kvdrift.instruments.replay import CapturedAttention, captured_of
from kvdrift.measure.merges import contexts_apart
from kvdrift.pairing.merges import Merges
from kvdrift.replay.attention import Floats, Operands, attend
from kvdrift.replay.eight_bits import Kernel, Way
from kvdrift.trace.model import PassPair

# The share of an error that a way of rounding leaves at most, at each position.
_LEFT_MOST = 1.0 / 8.0
# An error beyond this share of the context is none of 8 bits, one below it is that of a finer kernel.
_MOST, _LEAST = 1.0 / 4.0, 2.0**-20


def note_8_bits(known: Merges, pair: PassPair, kernel: Kernel) -> None:
    """Note the layers of a pair at float64 in which both passes attend with operands of 8 bits, and by what contexts
    are off there.

    A layer of which one pass shows no operands is left out. NaN and infinity are another error.
    """
    if pair.prefill.rung != "float64" or pair.decode.rung != "float64":
        return
    apart = contexts_apart(pair)
    if not apart:
        return
    passes = captured_of(pair)
    for layer in sorted(passes[0].layers & passes[1].layers & apart.keys()):
        if known.is_another(layer):
            return  # a mismatch begins here at the latest, and to look further costs much
        errors = _errors(pair, passes, layer, apart[layer])
        if errors is None:
            continue
        way = _way(errors, kernel)
        kernel.note(way)
        known.note(layer, np.nan if way is None else max(error.share for error in errors))


class _OffContext:
    """The context of one pass at one position beside float64 attention of its operands."""

    def __init__(self, operands: Operands, context: Floats) -> None:
        self.operands, exact = operands, attend(operands).context
        self.context = context.reshape(exact.shape) if context.size == exact.size else np.full_like(exact, np.nan)
        self.size, self.long = float(np.linalg.norm(self.context - exact)), float(np.linalg.norm(exact))

    @property
    def share(self) -> float:
        """By what share of itself the context is off; infinity where attention gives nothing."""
        return self.size / self.long if self.long > 0.0 else np.inf

    def is_of(self, way: Way) -> bool:
        """Whether operands that are rounded so have this context."""
        left = self.context - attend(way.of(self.operands, self.context)).context
        return float(np.linalg.norm(left)) <= _LEFT_MOST * self.size


def _errors(
    pair: PassPair, passes: tuple[CapturedAttention, CapturedAttention], layer: int, positions: list[int]
) -> list[_OffContext] | None:
    """The errors of both passes; None where one of them has none at some position, or cannot be computed again."""
    spec = pair.prefill.attention.get(layer)
    if spec is None or spec.is_biased:
        return None
    found = []
    for captured in reversed(passes):  # a step that is fitted to a prefill costs most
        for position in positions:
            context, operands = captured.context(layer, position), captured.operands(layer, position, spec)
            if context is None or isinstance(operands, str):
                return None
            found.append(_OffContext(operands, context))
    return found if all(error.share >= _LEAST for error in found) else None


def _way(errors: list[_OffContext], kernel: Kernel) -> Way | None:
    """The one way of rounding that all contexts come from."""
    if not all(error.share <= _MOST for error in errors):
        return None
    n_keys = max(len(error.operands.keys) for error in errors)
    ways = (*kernel.known, *kernel.others(n_keys))
    return next((way for way in ways if all(error.is_of(way) for error in errors)), None)


__all__ = ["note_8_bits"]
