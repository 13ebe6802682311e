"""Slips of a recording: attention that no operand explains as recorded, and that one of the usual mistakes does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import msgspec
import numpy as np

from kvdrift.replay.attention import Floats, Operands, attend
from kvdrift.vocabulary.facts import AttentionSpec


def _lying_as(order: tuple[int, int, int]) -> Callable[[Floats], Floats]:
    """Return what reads recorded rows [slot, head, dim], whose axes lay in another `order`, as they were meant."""
    back = tuple(int(axis) for axis in np.argsort(order))

    def read(rows: Floats) -> Floats:
        # Keys and values have widths of their own.
        return rows.reshape([rows.shape[axis] for axis in order]).transpose(back)

    return read


_LAYOUTS = {
    "[head, slot, dim]": _lying_as((1, 0, 2)),
    "[slot, dim, head]": _lying_as((0, 2, 1)),
    "[head, dim, slot]": _lying_as((1, 2, 0)),
}


def likely_slip(operands: Operands, context: Floats, bound: float) -> str:
    """Return the slip under which attention gives the recorded context [head, dim]; "" if none does.

    Args:
        operands: as recorded.
        context: as recorded; NaN explains nothing.
        bound: root mean square of |error| / (sum |p| |v|) that rounding does not reach.
    """
    found = [(error_of(changed, context), text) for text, changed in _slips(operands)]
    error, text = min(found, default=(math.inf, ""), key=lambda item: item[0])
    return text if error <= bound else ""


def error_of(operands: Operands, context: Floats) -> float:
    """Return the root mean square of |error| / (sum |p| |v|); infinite where the shapes do not fit, or it is NaN."""
    try:
        attended = attend(operands)
    except (ValueError, IndexError, ZeroDivisionError):
        return math.inf
    if attended.context.size != context.size:
        return math.inf
    error = context.reshape(attended.context.shape) - attended.context
    scaled = np.divide(error, attended.magnitude, out=np.zeros_like(error), where=attended.magnitude > 0.0)
    size = float(np.sqrt(np.mean(scaled**2)))
    from_nothing = np.any(error[attended.magnitude == 0.0])
    return math.inf if from_nothing or not math.isfinite(size) else size


def _slips(operands: Operands) -> Iterator[tuple[str, Operands]]:
    n, heads, dim = operands.keys.shape
    spec = operands.attention
    seen = np.arange(n, dtype=np.int64)
    latest = np.arange(operands.position - n + 1, operands.position + 1, dtype=np.int64)
    if n <= operands.position:
        text = "slots: the rows are those of the last tokens, and `slots` says 0, 1, 2 ...; name the position of each"
        yield text, operands.changed(slots=latest)
        ring = seen + (operands.position - seen) // n * n
        yield text, operands.changed(slots=ring)
    if n > operands.position + 1:
        text = "slots: rows behind the token are recorded; leave out what attention does not read"
        yield text, operands.changed(slots=latest)
    for text, scale in _scales(spec.scale, dim):
        yield text, operands.changed(attention=_with(spec, scale=scale))
    if spec.window is not None:
        yield (
            "window: attention saw every key; leave the window out",
            operands.changed(attention=_with(spec, window=None)),
        )
    if spec.softcap is not None:
        yield "softcap: it was not applied; leave it out", operands.changed(attention=_with(spec, softcap=None))
    if spec.sinks is not None:
        yield "sinks: they were not applied; leave them out", operands.changed(attention=_with(spec, sinks=None))
    if spec.slopes is not None:
        yield "slopes: they were not applied; leave them out", operands.changed(attention=_with(spec, slopes=None))
    for text, change in _LAYOUTS.items():
        keys, values = change(operands.keys), change(operands.values)
        yield (
            f"layout: the rows lie as {text} and were recorded as [slot, head, dim]",
            operands.changed(keys=keys, values=values),
        )
    if operands.query.shape[0] != heads:
        yield "layout: query heads read kv head h mod (kv heads); reorder the queries", operands.changed(tiled=True)
    if operands.query.shape[0] > 1:
        turned = operands.query.reshape(operands.query.shape[::-1]).T
        yield "layout: the query lies as [dim, head] and was recorded as [head, dim]", operands.changed(query=turned)


def _scales(scale: float, dim: int) -> Iterator[tuple[str, float]]:
    """Factors of q.k that engines have, but the one that was recorded."""
    known = {
        "1 / sqrt(dim)": dim**-0.5,
        "1": 1.0,
        "1 / dim": 1.0 / dim,
        "1 / sqrt(dim) / ln 2": dim**-0.5 / math.log(2),
    }
    known |= {"1 / sqrt(dim) * ln 2": dim**-0.5 * math.log(2)}
    for name, value in known.items():
        if not math.isclose(value, scale, rel_tol=1e-6):
            yield f"scale: attention used {name} = {value:.6g}, and {scale:.6g} was recorded", value


def _with(spec: AttentionSpec, **fields: object) -> AttentionSpec:
    return msgspec.structs.replace(spec, **fields)
