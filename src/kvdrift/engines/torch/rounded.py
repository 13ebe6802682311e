"""Activations that are rounded to few bits on the fly, before a product: which rounding it is, from the errors alone.

A product of rounded rows errs by `W (r(x) - x)`. Another rounding errs by something else, so the error of a product is
projected on what each rounding that engines use would do. The right one has the coefficient 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from kvdrift.engines.torch.precision import dtype_name
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF

ROUNDED_TO_8_BITS = "its activations are rounded to 8 bits on the fly"
# An error of so many roundings of the result, in the 2-norm, is worth a look, if it is this share of the result: eight
# bits of a row are off by a hundredth of it, and by less only where columns that are not rounded outweigh the others.
_COARSE = 1.2
_LEAST = 2.0**-16
# How near to 1 the coefficient is, and the share of the squared error that a rounding explains at least: the rest is
# how the results are rounded. Where a kernel rounds otherwise, both are near 0.
_NEAR, _EXPLAINED = 0.25, 0.4
# Columns that hold a number above this are not rounded by LLM.int8 (Dettmers et al. 2022).
_OUTLIER = 6.0
_FP8_MOST = 448.0


def note_of(multiply: Callable[[Tensor], Tensor], x: Tensor, y: Tensor, reference: Tensor) -> str | None:
    """Say whether the results `y` [row, out] are those of rows that were rounded to eight bits; None if they are not.

    Args:
        multiply: gives W x + b in float64 for rows [row, in].
        x: [row, in], as they went in.
        reference: `multiply(x)`.

    A pass that is off by more than its rounding is no sample of it; it takes rows of a prefill.
    """
    error = y.double() - reference
    least = max(_COARSE * UNIT_ROUNDOFF.get(dtype_name(y.dtype), 0.0), _LEAST)
    if not error.norm() > least * reference.norm() or not bool(torch.isfinite(error).all()):
        return None
    for rounded in _roundings(x.double()):
        moved = multiply(rounded) - reference
        size, along = float(moved.square().sum()), float((error * moved).sum())
        if (
            size > 0.0
            and abs(along / size - 1.0) < _NEAR
            and along**2 / size > _EXPLAINED * float(error.square().sum())
        ):
            return ROUNDED_TO_8_BITS
    return None


def _roundings(x: Tensor) -> Iterator[Tensor]:
    """The rows [row, in], rounded in each way that engines use: a scale for each row, in float32 or in bfloat16."""
    size = x.abs().amax(dim=1, keepdim=True)
    for levels in (127.0, 127.5, 128.0):
        yield from (_to_levels(x, scale) for scale in _scales(size / levels))
    most, least = x.amax(1, keepdim=True).clamp(min=0.0), x.amin(1, keepdim=True).clamp(max=0.0)
    for scale in _scales((most - least) / 255.0):
        step = torch.where(scale > 0.0, scale, 1.0)
        zero = (-128.0 - (least / step).round()).clamp(-128, 127)
        yield (((x / step).round() + zero).clamp(-128, 127) - zero) * step
    is_outlier = (x.abs() > _OUTLIER).any(dim=0)
    if bool(is_outlier.any()):
        inner = torch.where(is_outlier, 0.0, x)
        yield torch.where(is_outlier, x, _to_levels(inner, inner.abs().amax(dim=1, keepdim=True) / 127.0))
    for scale in (*_scales(size / _FP8_MOST), torch.ones_like(size)):
        step = torch.where(scale > 0.0, scale, 1.0)
        yield (x / step).clamp(-_FP8_MOST, _FP8_MOST).to(torch.float8_e4m3fn).double() * step


def _scales(scale: Tensor) -> tuple[Tensor, Tensor]:
    return scale, scale.to(torch.bfloat16).double()


def _to_levels(x: Tensor, scale: Tensor) -> Tensor:
    step = torch.where(scale > 0.0, scale, 1.0)
    return (x / step).round().clamp(-128, 127) * step


__all__ = ["ROUNDED_TO_8_BITS", "note_of"]
