"""The catalogue of causes inside attention: each is a small change of the operands of one decode step.

What a cause would do to the context is the difference that its change makes in the float64 replay. That difference is a
direction: an observed error is projected on it, and the coefficient says how much of the cause is in it (1 is all). A
direction has the shape [head, dim] and the unit of the context; it is NaN where one of the two contexts is NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvdrift.replay.attention import Attended, Floats, Operands, context_of, probabilities_of, scale_direction, visible
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.facts import AttentionSpec

# operands and their clean result -> direction [head, dim], None where the cause cannot happen
Direction = Callable[[Operands, Attended], Floats | None]


@dataclass(frozen=True, slots=True)
class AttentionCause:
    """One explanation of an attention error.

    `relative` causes have a size (the coefficient is a relative error, such as of the score scale); the others happen
    or do not (the coefficient of the true one is 1). `of_values` causes are about the values alone, and not about the
    scores.
    """

    name: Cause
    text: str
    direction: Direction
    relative: bool = False
    of_values: bool = False


# What the scaled scores before softcap are computed from, and the probabilities.
_OF_SCORES = ("query", "keys", "tiled")
_OF_PROBABILITIES = ("query", "keys", "slots", "position", "attention", "tiled", "seen", "scores")


def _difference(change: Callable[[Operands], Operands | None]) -> Direction:
    def direction(operands: Operands, attended: Attended) -> Floats | None:
        changed = change(operands)
        return None if changed is None else context_of(changed, _known(changed, operands, attended)) - attended.context

    return direction


def _known(changed: Operands, operands: Operands, attended: Attended) -> Floats | None:
    """The probabilities of changed operands as far as those of the clean ones give them, None where they do not."""
    if all(getattr(changed, name) is getattr(operands, name) for name in _OF_PROBABILITIES):
        return attended.probs
    is_same = all(getattr(changed, name) is getattr(operands, name) for name in _OF_SCORES)
    if is_same and changed.attention.scale == operands.attention.scale:
        return probabilities_of(changed, attended.raw)
    return None


def _lost(index: int) -> Direction:
    """The direction of a visible key that is not attended to; its scores beside those of the others are known."""

    def direction(operands: Operands, attended: Attended) -> Floats | None:
        seen = np.flatnonzero(visible(operands))
        if len(seen) < 2:
            return None
        lost = int(seen[index])

        def kept(rows: NDArray[Any], axis: int = 0) -> NDArray[Any]:
            if lost == 0:  # a view: keys and values are large
                return rows[1:] if axis == 0 else rows[:, 1:]
            return rows[:-1] if axis == 0 and lost == len(rows) - 1 else np.delete(rows, lost, axis)

        changed = operands.changed(
            values=kept(operands.values),
            slots=kept(operands.slots),
            seen=None if operands.seen is None else kept(operands.seen),
        )
        return context_of(changed, probabilities_of(changed, kept(attended.raw, 1))) - attended.context

    return direction


def _shifted(operands: Operands, attended: Attended) -> Floats | None:
    """The direction of keys of the slot before, whose scores are the known ones in another order."""
    if len(operands.slots) < 2:
        return None
    return context_of(operands, probabilities_of(operands, np.roll(attended.raw, 1, axis=1))) - attended.context


def _window(operands: Operands, by: int) -> Operands | None:
    window = operands.attention.window
    if window is None or window + by < 1:
        return None
    return operands.changed(attention=_attention(operands, window=window + by))


def _attention(operands: Operands, **fields: object) -> AttentionSpec:
    return msgspec.structs.replace(operands.attention, **fields)


def _softcap(operands: Operands) -> Operands | None:
    if operands.attention.softcap is None:
        return None
    return operands.changed(attention=_attention(operands, softcap=None))


def _sinks(operands: Operands, doubled: bool) -> Operands | None:
    sinks = operands.attention.sinks
    if sinks is None:
        return None
    new = tuple(sink + float(np.log(2.0)) for sink in sinks) if doubled else None
    return operands.changed(attention=_attention(operands, sinks=new))


def _tiled(operands: Operands) -> Operands | None:
    heads, kv_heads = operands.query.shape[0], operands.keys.shape[1]
    return operands.changed(tiled=True) if 1 < kv_heads < heads else None


def _values(operands: Operands, values: Floats) -> Operands | None:
    return operands.changed(values=values) if values.shape == operands.values.shape else None


ATTENTION_CAUSES: tuple[AttentionCause, ...] = (
    AttentionCause(Cause.SCORE_SCALE, "scores are multiplied by another scale", scale_direction, relative=True),
    AttentionCause(
        Cause.V_SCALE,
        "values are multiplied by a factor",
        lambda _, attended: attended.context,
        relative=True,
        of_values=True,
    ),
    AttentionCause(Cause.KEY_LOST_FIRST, "the first visible key is not attended to", _lost(0)),
    AttentionCause(
        Cause.KEY_LOST_LAST,
        "the last visible key, the token itself, is not attended to",
        _lost(-1),
    ),
    AttentionCause(Cause.WINDOW_TOO_LONG, "the window holds one key too many", _difference(lambda o: _window(o, 1))),
    AttentionCause(Cause.WINDOW_TOO_SHORT, "the window holds one key too few", _difference(lambda o: _window(o, -1))),
    AttentionCause(Cause.SOFTCAP_MISSING, "scores are not capped", _difference(_softcap)),
    AttentionCause(Cause.SINK_MISSING, "the attention sink is left out", _difference(lambda o: _sinks(o, False))),
    AttentionCause(Cause.SINK_DOUBLED, "the attention sink enters twice", _difference(lambda o: _sinks(o, True))),
    AttentionCause(
        Cause.HEADS_TILED, "query heads are mapped to kv heads by tile instead of by group", _difference(_tiled)
    ),
    AttentionCause(
        Cause.K_READ_AS_V,
        "keys are read in the place of values",
        _difference(lambda o: _values(o, o.keys)),
        of_values=True,
    ),
    AttentionCause(
        Cause.V_PERMUTED,
        "values belong to the slot before",
        _difference(lambda o: _values(o, np.roll(o.values, 1, axis=0))),
        of_values=True,
    ),
    AttentionCause(Cause.KEYS_SHIFTED, "keys belong to the slot before", _shifted),
)
