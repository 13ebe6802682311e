"""What rounding inside attention may do to its context, and which operands of fewer bits a kernel got."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvdrift.replay.attention import Attended, Floats, Operands, attend, score_conditioning, score_sizes
from kvdrift.replay.casts import operands_of_8_bits, rounded_operands
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

# Roundings of a score: while its inner product is summed, and where it is stored, scaled and masked in a half dtype.
_SUMMED = 4.0
# Mean error over sum |p| |v| that rounding cannot reach, in units of the native roundoff. Kernels that round the
# probabilities to the native dtype reach 2.5 of them at single addresses.
MOST_ROUNDINGS = 16.0
_STORED = 2.0
# Rounded operands leave this share of an error that is theirs at most; rounding of others makes it larger.
_EXPLAINS = 0.5


def from_scores_of(operands: Operands, attended: Attended, kept: str) -> float:
    """What rounding of scores that are kept in dtype `kept` may do to the context: inner products are accumulated in
    float32 at least, and rounded when they are stored in less."""
    coarsest = UNIT_ROUNDOFF.get(kept, UNIT_ROUNDOFF["float32"])
    accumulated = min(coarsest, UNIT_ROUNDOFF["float32"])
    summed = _SUMMED * accumulated * score_conditioning(operands, attended, score_sizes(operands))
    if coarsest == accumulated:
        return summed
    return summed + _STORED * coarsest * score_conditioning(operands, attended, np.abs(attended.raw))


def as_rounded(
    operands: Mapping[str, Operands | str], contexts: Mapping[str, Floats | None], dtype: str, kept: str | None
) -> tuple[dict[str, Operands | str], float]:
    """The operands as a kernel of fewer bits got them, where both passes compute attention of such ones, and not of
    those that were recorded; and what else may be rounded in such a kernel, relative to the context.

    A kernel of 16 bits has its scores `kept` in some dtype, and what it rounds to 16 bits is bounded elsewhere; None:
    another kernel. One that takes operands of 8 bits weighs the values in 16 bits.
    """
    both = [
        (given, context.astype(np.float64))
        for name, given in operands.items()
        if not isinstance(given, str) and (context := contexts[name]) is not None
    ]
    bound = MOST_ROUNDINGS * UNIT_ROUNDOFF.get(dtype, 0.0)
    scores = kept or "float32"
    before = [_off(given, context, scores) for given, context in both]
    if len(both) < len(operands) or all(off <= bound for off, _ in before):
        return dict(operands), 0.0
    of_8_bits = operands_of_8_bits, MOST_ROUNDINGS * UNIT_ROUNDOFF["float16"]
    for ways, allowed in (of_8_bits,) if kept else ((rounded_operands, 0.0), of_8_bits):
        for rounded in zip(*(ways(given) for given, _ in both), strict=True):
            after = [_off(given, context, scores) for given, (_, context) in zip(rounded, both, strict=True)]
            near = all(off <= max(bound, allowed) for off, _ in after)
            if near and all(new <= _EXPLAINS * old for (_, new), (_, old) in zip(after, before, strict=True)):
                return dict(zip(operands, rounded, strict=True)), allowed
    return dict(operands), 0.0


def _off(given: Operands, context: Floats, kept: str) -> tuple[float, float]:
    """What a context is off by from attention of these operands, in sum |p| |v|, beyond what rounding of scores `kept`
    in a dtype may do, and by itself."""
    attended = attend(given)
    if context.size != attended.context.size:
        return np.inf, np.inf
    scaled = np.abs(context.reshape(attended.context.shape) - attended.context)
    allowed = np.where(attended.magnitude > 0.0, attended.magnitude, 1.0)
    off = float(np.sqrt(np.mean((scaled / allowed) ** 2)))
    return off - from_scores_of(given, attended, kept), off


__all__ = ["MOST_ROUNDINGS", "as_rounded", "from_scores_of"]
