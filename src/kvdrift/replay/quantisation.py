"""Honest quantisation of cached rows, from its definition: what a quantised cache may do to a row, and no more.

Two kinds of format:

* integers of n bits, affine by group: for a group of neighbouring values x of one row, with
  step = (max - min) / (2^n - 1), a value becomes min + step * round((x - min) / step). The honest error is half a step
  (Liu et al. 2024, KIVI, section 3).
* float8 e4m3, one scale a layer: x becomes scale * float8(x / scale), with scale = max|x| / 448 over the rows of the
  first call, and is clipped at 448 * scale afterwards.

Integer caches keep the newest rows as they are until `residual` of them have come, and then quantise all rows again.
Nothing here knows an engine; rows are numpy arrays.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.trace.model import Array

# Rows that an integer cache of a scenario keeps unquantised. Engines keep 128; few enough that a scenario fills them.
RESIDUAL = 4
# The group that engines take; a smaller one where a row has fewer values, so that no group joins two rows.
LARGEST_GROUP = 64
_FP8 = ml_dtypes.float8_e4m3fn
_FP8_LARGEST = 448.0


@dataclass(frozen=True, slots=True)
class Format:
    """How a cache quantises its rows: integers of `n_bits`, or float8 if that is None."""

    name: str
    n_bits: int | None = None
    residual: int = 0

    @property
    def levels(self) -> int:
        """Steps from the smallest to the largest value of a group."""
        return (1 << (self.n_bits or 8)) - 1


# By the kind of cache that an engine opens.
FORMATS: Mapping[str, Format] = {
    "quantised-fp8": Format("float8 e4m3"),
    "quantised-int4": Format("4 bits", 4, RESIDUAL),
    "quantised-int2": Format("2 bits", 2, RESIDUAL),
}


def group_size(*dims: int) -> int:
    """Return the size of a group for rows of `dims` values a head: the largest that divides them all, at most 64."""
    return math.gcd(LARGEST_GROUP, *dims)


def steps_of(rows: Array, size: int, n_bits: int) -> NDArray[np.float64]:
    """Return the step of the group of every value, in the shape and unit of `rows`.

    Honestly quantised rows keep the minimum and the maximum of each group, and so the step. A value that is not finite
    makes the steps of its group infinite or NaN.

    Args:
        rows: [..., dim]; `dim` is a multiple of `size`.
        size: values in a group.
        n_bits: of each integer.
    """
    groups = rows.reshape(-1, size).astype(np.float64)
    with np.errstate(invalid="ignore"):
        step = (groups.max(axis=1) - groups.min(axis=1)) / (2**n_bits - 1)
    return np.repeat(step, size).reshape(rows.shape)


def quantised_integers(rows: Array, size: int, n_bits: int) -> Array:
    """Return the nearest honestly quantised rows, in the shape, unit and dtype of `rows`.

    A group of equal values stays as it is, and so does one with a NaN. An infinity beside other values makes its group
    NaN.

    Args:
        rows: [..., dim]; `dim` is a multiple of `size`.
        size: values in a group.
        n_bits: of each integer.
    """
    wide = _wide(rows)
    groups = rows.reshape(-1, size).astype(wide)
    low = groups.min(axis=1, keepdims=True)
    step = (groups.max(axis=1, keepdims=True) - low) / wide(2**n_bits - 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        code = np.clip(np.rint((groups - low) / step), 0, 2**n_bits - 1)
    found = np.where(step > 0.0, code * step + low, groups)
    return found.reshape(rows.shape).astype(rows.dtype)


def quantised_float8(rows: Array, scale: float) -> Array:
    """Return the rows rounded to float8 with one `scale`, in the shape, unit and dtype of `rows` [...].

    NaN stays NaN, and an infinity becomes the largest value, 448 * scale. A scale that is not finite makes all NaN.
    """
    wide = _wide(rows)
    unit = np.asarray(scale, dtype=wide)
    # Through float32, as every conversion to float8 goes: rounding twice may fall otherwise than rounding once.
    ratio = np.divide(rows.astype(wide), unit).astype(np.float32)
    code = np.clip(ratio, -_FP8_LARGEST, _FP8_LARGEST).astype(_FP8)
    found: Array = np.multiply(code.astype(wide), unit).astype(rows.dtype)
    return found


def float8_scale(rows: Array) -> float:
    """Return the scale with which the largest magnitude of `rows` [...] becomes the largest float8.

    It has the unit of the rows, is above 0, and is NaN or infinite if a value is.
    """
    wide = _wide(rows)
    largest = wide(np.abs(rows.astype(wide)).max(initial=0.0)) / wide(_FP8_LARGEST)
    return float(max(largest, wide(np.finfo(np.float32).tiny)))


def _wide(rows: Array) -> type[np.float32] | type[np.float64]:
    return np.float64 if rows.dtype == np.float64 else np.float32


class HonestRows:
    """The rows of one layer, K or V, as an honestly quantised cache would hand them back call by call."""

    def __init__(self, form: Format, size: int) -> None:
        self._form = form
        self._size = size  # of a group, a divisor of the values of a row
        self._stored: Array | None = None  # quantised
        self._recent: Array | None = None  # not yet
        self._scale = 1.0

    def extend(self, rows: Array) -> Array:
        """Write `rows` [batch, head, token, dim] and return all rows that attention reads in this call.

        The result is [batch, head, slot, dim] in the dtype of `rows`, the newest slot last. The rows of the first call
        are read as they are; only later calls see what was stored of them. NaN and infinities are stored as
        `quantised_float8` and `quantised_integers` say.
        """
        form = self._form
        if self._stored is None:
            self._scale = float8_scale(rows)
            self._stored = self._quantise(rows)
            return rows
        if form.n_bits is None:
            self._stored = np.concatenate([self._stored, self._quantise(rows)], axis=2)
            return self._stored
        recent = rows if self._recent is None else np.concatenate([self._recent, rows], axis=2)
        read = np.concatenate([self._stored, recent], axis=2)
        if recent.shape[2] >= form.residual:
            self._stored, self._recent = self._quantise(read), None
        else:
            self._recent = recent
        return read

    def _quantise(self, rows: Array) -> Array:
        if self._form.n_bits is None:
            return quantised_float8(rows, self._scale)
        return quantised_integers(rows, self._size, self._form.n_bits)
