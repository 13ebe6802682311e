"""What rounding inside attention may do to its context, and which operands of fewer bits a kernel got."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from kvdrift.replay.attention import Attended, Floats, Operands, attend, score_conditioning, score_sizes
from kvdrift.replay.casts import rounded_operands
from kvdrift.replay.eight_bits import Kernel, Way
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

# Roundings of a score: while its inner product is summed, and where it is stored, scaled and masked in a half dtype.
_SUMMED = 4.0
# Mean error over sum |p| |v| that rounding cannot reach, in units of the native roundoff. Kernels that round the
# probabilities to the native dtype reach 2.5 of them at single addresses.
MOST_ROUNDINGS = 16.0
_STORED = 2.0
# Rounded operands leave this share of an error that is theirs at most; rounding of others makes it larger.
_EXPLAINS = 0.5
# What a kernel of operands of 8 bits may round beside them: it weighs the values in 16 bits.
OF_8_BITS = MOST_ROUNDINGS * UNIT_ROUNDOFF["float16"]
# No rounding to 8 bits makes an error over sum |p| |v| beyond this.
_MOST_OF_8_BITS = 0.25


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
    operands: Mapping[str, Operands | str],
    contexts: Mapping[str, Floats | None],
    dtype: str,
    kept: str | None,
    kernel: Kernel | None = None,
) -> tuple[dict[str, Operands | str], float]:
    """The operands as a kernel of fewer bits got them, where both passes compute attention of such ones, and not of
    those that were recorded; and what else may be rounded in such a kernel, relative to the context.

    A kernel of 16 bits has its scores `kept` in some dtype, and what it rounds to 16 bits is bounded elsewhere; None:
    another kernel. One that takes operands of 8 bits weighs the values in 16 bits; `kernel` is what is known of it.
    """
    both = _shown(operands, contexts)
    bound = MOST_ROUNDINGS * UNIT_ROUNDOFF.get(dtype, 0.0)
    scores = kept or "float32"
    before = [_off(given, context, scores) for given, context in both]
    if len(both) < len(operands) or all(off <= bound for off, _ in before):
        return dict(operands), 0.0

    for rounded in () if kept else zip(*(rounded_operands(given) for given, _ in both), strict=True):
        after = [_off(given, context, scores) for given, (_, context) in zip(rounded, both, strict=True)]
        is_near = all(off <= bound for off, _ in after)
        if is_near and all(new <= _EXPLAINS * old for (_, new), (_, old) in zip(after, before, strict=True)):
            return dict(zip(operands, rounded, strict=True)), 0.0
    return as_8_bits(operands, contexts, dtype, kept, kernel or Kernel())


def as_8_bits(
    operands: Mapping[str, Operands | str],
    contexts: Mapping[str, Floats | None],
    dtype: str,
    kept: str | None,
    kernel: Kernel,
) -> tuple[dict[str, Operands | str], float]:
    """The operands as a kernel of 8 bits got them, where both passes compute attention of such ones in one way, and
    what else such a kernel may round; the recorded ones and nothing if they do not.

    The way that leaves least must take half of the errors. One that was found at another token holds here if it takes
    anything off them, where no way takes half.
    """
    both = _shown(operands, contexts)
    scores, bound = kept or "float32", max(MOST_ROUNDINGS * UNIT_ROUNDOFF.get(dtype, 0.0), OF_8_BITS)
    before = [_off(given, context, scores) for given, context in both]
    if len(both) < len(operands) or not all(off <= _MOST_OF_8_BITS for _, off in before):
        return dict(operands), 0.0

    alone_first = sorted(range(len(both)), key=lambda at: not both[at][0].is_alone)
    lefts = [0.0] * len(both)

    def tried(ways: Iterable[Way]) -> tuple[float, list[Operands], Way | None]:
        """The way that leaves least, of those that take something off the errors of each pass, behind the share."""
        best: tuple[float, list[Operands], Way | None] = (np.inf, [], None)
        for way in ways:
            rounded: dict[int, Operands] = {}
            for at in alone_first:
                given, context = both[at]
                new, left = _off(one := way.of(given, context), context, scores)
                if not (new <= bound and left <= before[at][1]):
                    break  # to fit the step of a prefill's query costs most
                rounded[at], lefts[at] = one, left
            share = float(np.linalg.norm(lefts) / np.linalg.norm([off for _, off in before]))
            if len(rounded) == len(both) and share < best[0]:
                best = share, [rounded[at] for at in range(len(both))], way
        return best

    known = tried(kernel.known)
    found = known
    if not known[0] <= _EXPLAINS:
        found = tried(kernel.others(max(len(given.keys) for given, _ in both)))
        kernel.note(found[2] if found[0] <= _EXPLAINS else None)
    if not found[0] <= _EXPLAINS:
        found = known
    if not found[0] <= 1.0:
        return dict(operands), 0.0
    return dict(zip(operands, found[1], strict=True)), OF_8_BITS


def _shown(
    operands: Mapping[str, Operands | str], contexts: Mapping[str, Floats | None]
) -> list[tuple[Operands, Floats]]:
    """The operands and the context of the passes that show both."""
    return [
        (given, context.astype(np.float64))
        for name, given in operands.items()
        if not isinstance(given, str) and (context := contexts[name]) is not None
    ]


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


__all__ = ["MOST_ROUNDINGS", "as_8_bits", "as_rounded", "from_scores_of"]
