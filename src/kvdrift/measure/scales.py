"""A scale of scores that one pass has with fewer digits: what attention is off by where nothing else is wrong.

A kernel that holds its scale, or log2(e) in front of an exp2, in float32 or with nine digits multiplies all scores by
one number near 1. No perturbed pass shows that, since a constant does not change. It is told by its shape: the errors
of a pass against attention of its own operands in float64 are

    c d(context) / d log(scale)    with one c for all heads, tokens and layers,

and c as large as such a constant makes it. An error that is another one in a head or layer, or is no such derivative,
is not excused by it; nor is a smaller c, such as a planted fault of the least size that is found.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvdrift.instruments.replay import CapturedAttention, captured_of
from kvdrift.pairing.scales import Scales
from kvdrift.replay.attention import Floats, attend, scale_direction
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode

# An error that is no larger than this share of the context is one of float64.
_NEAR = 2.0**-42
# The share of an error that the derivative leaves at most.
_LEFT_MOST = 1.0 / 8.0


class _Error(NamedTuple):
    """What of an error is a factor of the scores, and what it makes of the context, in the 2-norm; NaN: it is another
    error."""

    factor: float
    size: float


_ANOTHER = _Error(np.nan, np.nan)


def note_scales(known: Scales, pair: PassPair) -> None:
    """Note by what scores of the two passes are multiplied, where their contexts differ.

    With aligned inputs a kernel that shows none of its operands has those of prefill, but for rounding. Passes at
    another precision than float64 show nothing. A layer that cannot be computed again has another error, as
    have NaN and infinity.
    """
    if pair.prefill.rung != "float64" or pair.decode.rung != "float64":
        return
    passes = captured_of(pair)
    for layer in sorted(passes[0].layers):
        is_shown = layer in passes[1].layers
        if not is_shown and pair.mode != Mode.KV_ALIGNED:
            continue  # as designed, its operands are off by what the layers below are off by
        of_decode = passes[1] if is_shown else passes[0]
        for position in pair.positions:
            first, second = (captured.context(layer, position) for captured in passes)
            if first is None or second is None or first.shape != second.shape:
                continue
            if np.linalg.norm(second - first) <= _NEAR * np.linalg.norm(first):
                continue
            errors = (
                _error(pair.prefill, passes[0], first, layer, position),
                _error(pair.decode if is_shown else pair.prefill, of_decode, second, layer, position),
            )
            known.note(layer, errors[1].factor - errors[0].factor, errors[0].size + errors[1].size)


def _error(trace: Trace, captured: CapturedAttention, context: Floats, layer: int, position: int) -> _Error:
    """The error of a context against attention of captured operands; where that cannot be computed, it is another."""
    spec = trace.attention.get(layer)
    if spec is None or spec.is_biased:
        return _ANOTHER
    operands = captured.operands(layer, position, spec)
    if isinstance(operands, str):
        return _ANOTHER
    attended = attend(operands)
    if context.size != attended.context.size:
        return _ANOTHER
    error, long = context - attended.context.ravel(), float(np.linalg.norm(attended.context))
    if np.linalg.norm(error) <= _NEAR * long:
        return _Error(0.0, 0.0)
    direction = scale_direction(operands, attended).ravel()
    along = float(np.sum(direction * direction))
    factor = float(np.sum(error * direction)) / along if along > 0.0 else np.nan
    left = float(np.linalg.norm(error - factor * direction))
    if not left <= _LEFT_MOST * float(np.linalg.norm(error)):
        return _ANOTHER
    return _Error(factor, max(abs(factor), float(np.linalg.norm(error)) / long))


__all__ = ["note_scales"]
