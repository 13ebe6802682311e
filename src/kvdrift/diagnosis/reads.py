"""Explanations of how a decode kernel reads right operands: query heads exchanged, one query at every step, values
rounded under a scale that is not theirs, powers that are only nearly those of e."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import ml_dtypes
import numpy as np

from kvdrift.diagnosis.hidden import contexts_at_others
from kvdrift.diagnosis.model import EXACT, NAMED, Bools, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import both_rows, capped
from kvdrift.replay.attention import Attended, Operands, attend, context_of, rows_per_head
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_LOG2_E = float(np.log2(np.e))
# Scales that are tried in each of two octaves, and how often the best of them is looked at more closely.
_SCALES, _REFINEMENTS, _NEAR = 192, 7, 9
_FLOAT8 = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "float8_e5m2": ml_dtypes.float8_e5m2}
# Terms of an approximated power, and steps in which they are fitted.
_TERMS, _STEPS = 5, 6
_MOST_CHANGE = 30.0
# What is fitted to the context fits a part of anything; only where it leaves next to nothing does it say something.
_NEARLY_ALL = 0.9


def explain_query_heads(rows: tuple[Floats, Floats], visible: Bools, operands: Operands) -> Iterator[Candidate]:
    """Yield the scores of query heads in another order, each on the keys of its place, as an einsum makes them whose
    letters are exchanged."""
    heads = operands.query.shape[0]
    keys = rows_per_head(operands.keys, operands)
    scores = operands.attention.scale * np.einsum("gd,hsd->hgs", operands.query, keys)  # head g in the place of h
    scores = capped(scores, operands.attention.softcap)
    inside = operands.slots < rows[1].shape[1]
    slots = operands.slots[inside]
    gaps = np.where(visible[:, slots][:, None], rows[1][:, slots][:, None] - scores[:, :, inside], 0.0)
    order = np.argmin((gaps**2).sum(axis=2), axis=1)
    if np.array_equal(order, np.arange(heads)):
        return
    predicted = rows[0].copy()
    predicted[:, slots] = scores[np.arange(heads), order][:, inside]
    explained = share(rows[0][visible], rows[1][visible], predicted[visible])
    if explained <= _NEARLY_ALL:
        return
    text = f"query heads stand in the order {order.tolist()} where attention scores them"
    yield Candidate(explained, Cause.Q_HEADS_PERMUTED, text, EXACT)


def explain_frozen_query(suspect: Suspect) -> Iterator[Candidate]:
    """Yield that decode attends with one query at every step: its scores of a key are then the same at all positions.

    It is tested on the steps behind the first failing one; without any, nothing is claimed. What is left over is held
    against how far prefill's scores move from step to step as well: beside a large error any scores stand still.
    """
    found = {position: both_rows(suspect, Site.ATTN_SCORES, position) for position in suspect.positions}
    first = found.pop(suspect.address.position)
    total = moved = left = 0.0
    for rows in found.values():
        if first is None or rows is None:
            continue
        n_keys = min(first[1].shape[1], rows[1].shape[1])
        sides = [side[:, :n_keys] for side in (*first, *rows)]
        seen = np.all([np.isfinite(side) for side in sides], axis=(0, 1))
        if int(seen.sum()) < 2:
            continue
        before, frozen, prefill, decode = (side[:, seen] - side[:, seen].mean(axis=1, keepdims=True) for side in sides)
        total += float(((decode - prefill) ** 2).sum())
        moved += float(((prefill - before) ** 2).sum())
        left += float(((decode - frozen) ** 2).sum())
    total = min(total, moved)
    if left < (1.0 - _NEARLY_ALL) * total:
        text = "decode attends with one query at every step, which is that of none of these tokens"
        yield Candidate(1.0 - left / total, Cause.QUERY_FROZEN, text, NAMED)


def explain_rounded_values(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield the context of values that were rounded to eight bits under one scale, found by trying: that of the step
    before, where the largest value has grown since, cuts it off."""
    largest = float(np.abs(operands.values).max(initial=0.0))
    if not 0.0 < largest < np.inf:
        return
    for name, dtype in _FLOAT8.items():
        most = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]

        def at(log_scale: float, dtype: type = dtype, most: float = most) -> Floats:
            scale = 2.0**log_scale
            codes = np.clip(operands.values / scale, -most, most).astype(dtype).astype(np.float64)
            return context_of(operands.changed(values=codes * scale), clean.probs)

        middle = float(np.log2(largest / most))
        best, explained = _best(at, clean.context, wrong, (middle - 1.0, middle + 1.0))
        if explained > _NEARLY_ALL:
            ratio = 2.0 ** (best - middle)
            text = (
                f"attention weighs values rounded to {name} under a scale that is {ratio:.4g} times that of its largest"
                + (", which is cut off" if ratio < 0.999 else "")
            )
            yield Candidate(explained, Cause.VALUES_ROUNDED_FP8, text, NAMED)


def _best(
    at: Callable[[float], Floats], clean: Floats, wrong: Floats, limits: tuple[float, float]
) -> tuple[float, float]:
    """The parameter whose prediction explains most, and its share: a grid, then ever closer around the best point."""
    low, high = limits
    best, explained, count = low, -np.inf, 2 * _SCALES + 1
    for _ in range(_REFINEMENTS):
        for point in np.linspace(low, high, count):
            found = share(clean, wrong, at(float(point)))
            if found > explained:
                best, explained = float(point), found
        width = (high - low) / (count - 1)
        low, high, count = best - width, best + width, _NEAR
    return best, explained


def explain_approximated_powers(suspect: Suspect, operands: Operands, wrong: Floats) -> Iterator[Candidate]:
    """Yield the context of weights whose powers are off by a function of their own: of the fraction of the exponent of
    two, as where a mantissa is approximated by a polynomial, or of the whole exponent, as in a series.

    The function is fitted to the first failing position, and what it predicts at the others counts as well.
    """
    parts = ("the fraction of their exponent", _of_fraction), ("their whole exponent", _of_exponent)
    for what, terms in parts:
        fitted = _fitted(operands, wrong, terms)
        if fitted is None:
            continue
        coefficients, predicted = fitted
        explained = share(attend(operands).context, wrong, predicted)
        for others, context in contexts_at_others(suspect):
            explained = min(explained, share(attend(others).context, context, _context(others, terms, coefficients)))
        if explained > _NEARLY_ALL:
            most = float(np.abs(np.expm1(_change(operands, terms, coefficients))).max())
            text = f"the powers of softmax are approximated: they are off by up to {most:.2g}, by a function of {what}"
            yield Candidate(explained, Cause.EXP_APPROXIMATED, text, NAMED)


def _exponents(operands: Operands) -> Floats:
    """Scores less the largest of their head, as powers of two [head, slot]; of hidden keys 0."""
    attended = attend(operands)
    scores = np.where(attended.probs > 0.0, capped(attended.raw, operands.attention.softcap), np.nan)
    return np.asarray(np.nan_to_num((scores - np.nanmax(scores, axis=1, keepdims=True)) * _LOG2_E))


def _of_fraction(exponents: Floats) -> Floats:
    """Terms [..., term] of a polynomial of the fraction; a constant factor of all weights changes nothing."""
    part = exponents - np.floor(exponents)
    return np.stack([part ** (1 + power) for power in range(_TERMS)], axis=-1)


def _of_exponent(exponents: Floats) -> Floats:
    """Terms [..., term] of a smooth function; a linear one is a scale of the scores."""
    return np.stack([exponents ** (2 + power) / 10.0**power for power in range(2)], axis=-1)


def _change(operands: Operands, terms: Callable[[Floats], Floats], coefficients: Floats) -> Floats:
    """The logarithm of the factor of each power [head, slot], within bounds where a step of the fit goes astray."""
    change = np.einsum("hst,t->hs", terms(_exponents(operands)), coefficients)
    return np.asarray(np.clip(change, -_MOST_CHANGE, _MOST_CHANGE))


def _context(operands: Operands, terms: Callable[[Floats], Floats], coefficients: Floats) -> Floats:
    weights = attend(operands).probs * np.exp(_change(operands, terms, coefficients))
    sums = weights.sum(axis=1, keepdims=True)
    return context_of(operands, weights / np.where(sums > 0.0, sums, 1.0))


def _fitted(operands: Operands, wrong: Floats, terms: Callable[[Floats], Floats]) -> tuple[Floats, Floats] | None:
    """The coefficients for which the context comes nearest to `wrong`, and that context; None if nothing is fitted.
    Gauss and Newton, with differences for slopes."""
    if operands.attention.sinks is not None or not np.isfinite(wrong).all():
        return None
    count = terms(np.zeros(1)).shape[-1]
    if wrong.size < 4 * count:
        return None
    coefficients = np.zeros(count)
    for _ in range(_STEPS):
        now = _context(operands, terms, coefficients)
        slopes = np.stack(
            [(_context(operands, terms, coefficients + step) - now).ravel() / 1e-5 for step in 1e-5 * np.eye(count)], 1
        )
        coefficients = coefficients + np.linalg.lstsq(slopes, (wrong - now).ravel(), rcond=1e-10)[0]
        if not np.isfinite(coefficients).all() or np.abs(coefficients).max() > 10.0:
            return None
    return coefficients, _context(operands, terms, coefficients)


__all__ = ["explain_approximated_powers", "explain_frozen_query", "explain_query_heads", "explain_rounded_values"]
