"""Explanations of rows that hold what they should in another form: fewer bits, another scale, other bits, no tail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import permutations

import ml_dtypes
import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, Candidate, Floats, Indices, share
from kvdrift.diagnosis.plain import ROUNDED
from kvdrift.vocabulary.causes import Cause

_STORED_IN = {
    "bfloat16": Cause.KV_ROUNDED_BF16,
    "float16": Cause.KV_ROUNDED_FP16,
    "float8_e4m3fn": Cause.KV_ROUNDED_FP8,
    "float8_e5m2": Cause.KV_ROUNDED_FP8,
}
# Levels to each side of zero, by the number of bits of a signed code, and what rounding to it is called.
_LEVELS = {
    "int2": (1, Cause.KV_ROUNDED_INT2),
    "int3": (3, Cause.KV_ROUNDED_INT3),
    "int4": (7, Cause.KV_ROUNDED_INT4),
    "int5": (15, Cause.KV_ROUNDED_INT5),
    "int8": (127, Cause.KV_ROUNDED_INT8),
}
# Rows of K and V are [slot, head, dim]; one scale for each of what is left when these axes are taken together.
_SHARED_BY: dict[str, int | tuple[int, ...]] = {"channel": 0, "head of a row": 2, "row": (1, 2), "tensor": (0, 1, 2)}
_FLOAT8 = {name: dtype for name, dtype in ROUNDED.items() if name.startswith("float8")}
# Ratios of two numbers of eight bits that are nearer to each other than this, after rounding to 16 bits, are one.
_SAME_RATIO = 0.02
_CODES = (4, 7, 8, 16)
_MOST_BITS = 11
_FEWEST_HEADS = 2
# An offset that was fitted to fewer elements says nothing.
_FEWEST = 8


def explain_storage(name: str, rows: Floats, read: Floats, bad: Indices, rung: str) -> Iterator[Candidate]:
    """Yield what may have been done to rows of K or V between writing and reading.

    Args:
        name: "key" or "value", for the text.
        rows: the right rows [slot, head, dim].
        read: what decode read, of the same shape. With NaN or infinity in it nothing is explained.
        bad: indices of the slots that differ.
        rung: the rung of the pair, at which scales are computed.
    """
    yield from _explain_rows(name, rows, read, bad, rung)
    size = _n_shared(rows, read)
    if size:
        # In latent attention the other elements are computed from what is cached, and these are what is cached.
        cached, found = (side[:, :1, -size:] for side in (rows, read))
        words = (
            f" (told from the last {size} elements, which all heads share: the others are computed from what is cached)"
        )
        yield from (replace(item, text=item.text + words) for item in _explain_rows(name, cached, found, bad, rung))


def _n_shared(rows: Floats, read: Floats) -> int:
    """How many of the last elements of rows [slot, head, dim] all heads share on both sides, 0 where that is none or
    all of them."""
    _, n_heads, dim = rows.shape
    if n_heads < _FEWEST_HEADS:
        return 0
    differs = np.flatnonzero(np.any([(side != side[:, :1]).any(axis=(0, 1)) for side in (rows, read)], axis=0))
    return dim - 1 - int(differs[-1]) if len(differs) else 0


def _explain_rows(name: str, rows: Floats, read: Floats, bad: Indices, rung: str) -> Iterator[Candidate]:
    """What `explain_storage` does with the rows as they are."""
    right, wrong = rows[bad], read[bad]
    if not wrong.any():
        return  # any grid that is coarse enough leaves zeros; they are called so
    for dtype_name, dtype in ROUNDED.items():
        text = f"{len(bad)} {name} rows are read as if stored in {dtype_name}"
        yield Candidate(share(right, wrong, _through(right, dtype)), _STORED_IN[dtype_name], text, EXACT)
    yield from _levels(name, rows, wrong, bad, rung)
    yield from _codes_cut(name, rows, wrong, bad, rung)
    yield from _truncated(name, right, wrong)
    for stored, taken in ((ml_dtypes.bfloat16, np.float16), (np.float16, ml_dtypes.bfloat16)):
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = right.astype(stored).view(np.int16).view(taken).astype(np.float64)
        text = f"{len(bad)} {name} rows are stored as {np.dtype(stored).name} and read as {np.dtype(taken).name}"
        yield Candidate(share(right, wrong, predicted), Cause.KV_BITS_REINTERPRETED, text, EXACT)
    yield from _other_float8(name, right, wrong)
    yield from _offsets(name, right, wrong)
    norm = float((right**2).sum())
    factor = float((right * wrong).sum()) / norm if norm else 0.0
    if factor:
        text = f"{len(bad)} {name} rows are multiplied by {factor:.6g}, as by a scale that is lost or applied twice"
        cause = Cause.K_SCALE_LOST if name == "key" else Cause.V_SCALE
        yield Candidate(share(right, wrong, factor * right), cause, text)
    yield from _scales_by_head(name, right, wrong)


def _other_float8(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Rows [slot, head, dim] that were stored in one format of eight bits and are read as another, under one scale for
    all of them or for each head of a row.

    By how much an element changes tells its code: the ratio of what its bits mean in the two formats. The scale is
    then the element over what its code means, and that of the largest element is tried on all others.
    """
    for (stored, first), (taken, second) in permutations(_FLOAT8.items(), 2):
        numbers = np.arange(256, dtype=np.uint8)
        means, read = (numbers.view(kind).astype(np.float64) for kind in (first, second))
        usable = np.isfinite(means) & np.isfinite(read) & (means > 0.0) & (read > 0.0)
        means, read = means[usable], read[usable]

        def at(rows: Floats, scale: float, first: type = first, second: type = second) -> Floats:
            with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                return (rows / scale).astype(first).view(second).astype(np.float64) * scale

        def fitted(rows: Floats, seen: Floats, means: Floats = means, read: Floats = read) -> Floats:
            largest = np.unravel_index(int(np.abs(rows).argmax()), rows.shape)
            if rows[largest] == 0.0 or not seen[largest] / rows[largest] > 0.0:
                return rows
            ratio = seen[largest] / rows[largest]
            scales = np.abs(rows[largest]) / means[np.abs(read / means / ratio - 1.0) < _SAME_RATIO]
            tried = [found for scale in scales if np.isfinite(found := at(rows, scale)).all()]
            return max(tried, key=lambda found: share(rows, seen, found), default=rows)

        text = f"{len(right)} {name} rows are stored as {stored} and read as {taken}"
        heads = [[fitted(r, w) for r, w in zip(*both, strict=True)] for both in zip(right, wrong, strict=True)]
        for predicted in (fitted(right, wrong), np.array(heads)):
            if (explained := share(right, wrong, predicted)) >= LEAST_ENOUGH:
                yield Candidate(explained, Cause.KV_BITS_REINTERPRETED, text, EXACT)


def _scales_by_head(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Rows [slot, head, dim] with a factor for each head of each row, as of the scale of another row: believed of rows
    that are long enough, since each factor is fitted."""
    norms = (right**2).sum(axis=2, keepdims=True)
    if right.shape[1] < 2 or right.shape[2] < _FEWEST or not norms.all():
        return
    factors = (right * wrong).sum(axis=2, keepdims=True) / norms
    if share(right, wrong, factors * right) < LEAST_ENOUGH:
        return
    text = (
        f"{len(right)} {name} rows are multiplied by a factor of each head, {factors.min():.6g} to "
        f"{factors.max():.6g}, "
        "as by the scale of another row"
    )
    cause = Cause.K_SCALE_LOST if name == "key" else Cause.V_SCALE
    yield Candidate(share(right, wrong, factors * right), cause, text, GENERAL)


def _through(values: Floats, dtype: type) -> Floats:
    with np.errstate(over="ignore", invalid="ignore"):
        return np.asarray(values.astype(dtype).astype(np.float64))


def at_rung(rung: str, values: Floats) -> Floats:
    """Round to the dtype in which the rows are held, as an engine that computes in it does at each step."""
    return _through(values, ROUNDED[rung]) if rung in ROUNDED else values


def _levels(name: str, rows: Floats, wrong: Floats, bad: Indices, rung: str) -> Iterator[Candidate]:
    """Rounded to a grid: steps of the largest value over the number of levels, or from the least to the largest."""
    for code, (levels, cause) in _LEVELS.items():
        for shared, axes in _SHARED_BY.items():
            with np.errstate(divide="ignore", invalid="ignore"):
                scale = at_rung(rung, np.abs(rows).max(axis=axes, keepdims=True) / levels)
                even = np.where(scale > 0.0, at_rung(rung, np.round(at_rung(rung, rows / scale)) * scale), rows)
                least = rows.min(axis=axes, keepdims=True)
                step = at_rung(rung, (rows.max(axis=axes, keepdims=True) - least) / (2 * levels + 1))
                uneven = np.where(step > 0.0, at_rung(rung, np.round((rows - least) / step) * step + least), rows)
            text = f"{len(bad)} {name} rows are rounded to {code} codes with one scale for each {shared}"
            for predicted in (even, uneven):
                yield Candidate(share(rows[bad], wrong, predicted[bad]), cause, text, EXACT)


def _codes_cut(name: str, rows: Floats, wrong: Floats, bad: Indices, rung: str) -> Iterator[Candidate]:
    """Codes lose their upper bits: what is left of code c, with an offset that makes it positive, is c mod 2^bits."""
    for levels in _CODES:
        scale = at_rung(rung, np.abs(rows).max(axis=0, keepdims=True) / levels)
        with np.errstate(divide="ignore", invalid="ignore"):
            codes = np.where(scale > 0.0, np.round(at_rung(rung, rows / scale)), 0.0)
        for bits in (1, 2, 3, 4):
            if 2**bits > 2 * levels:
                continue
            text = f"{name} rows are codes of {2 * levels} levels of which {bits} bits are read"
            for offset in (0, levels):
                predicted = (np.remainder(codes + offset, 2**bits) - offset) * scale
                predicted = at_rung(rung, predicted)
                yield Candidate(share(rows[bad], wrong, predicted[bad]), Cause.KV_CODES_CUT, text, EXACT)


def _offsets(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """A number is added to each head of a row, as where the zero point of a quantised row is lost."""
    if right.shape[2] < _FEWEST:
        return
    added = (wrong - right).mean(axis=2, keepdims=True)
    text = (
        f"one number is added to all elements of a head, {added.min():.4g} to {added.max():.4g} in {len(right)} {name} "
        "rows"
    )
    yield Candidate(share(right, wrong, right + added), Cause.QUANTISED_ZERO_POINT_LOST, text)


def _truncated(name: str, right: Floats, wrong: Floats) -> Iterator[Candidate]:
    """Significands are cut towards zero instead of rounded."""
    mantissa, exponent = np.frexp(right)
    for bits in range(2, _MOST_BITS):
        predicted = np.ldexp(np.trunc(mantissa * 2**bits) / 2**bits, exponent)
        text = f"{len(right)} {name} rows are cut to {bits} significant bits instead of rounded"
        yield Candidate(share(right, wrong, predicted), Cause.KV_TRUNCATED, text, EXACT)
