"""Which operands a kernel of fewer bits got, and by how much it errs against attention of them in 16 bits."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from kvdrift.instruments.exact import LEAST, Sizes, measure_errors
from kvdrift.replay.attention import Attended, Floats, Operands, attend, context_spread
from kvdrift.replay.eight_bits import Kernel
from kvdrift.replay.narrow import as_8_bits, as_rounded
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF


def as_got(
    operands: dict[str, Operands | str],
    contexts: Mapping[str, Floats | None],
    dtype: str,
    kept: str | None,
    kernel: Kernel,
) -> tuple[dict[str, Operands | str], float]:
    """The operands as a kernel of fewer bits got them, and what else it may round; see `as_rounded`.

    Contexts of a kernel of 16 bits that err by less than its own rounding are not looked at.
    """
    found, coarse = as_rounded(operands, contexts, dtype, kept, kernel)
    if kept is not None and not coarse and _are_beyond(found, contexts, dtype):
        return as_8_bits(found, contexts, dtype, kept, kernel)
    return found, coarse


def _are_beyond(operands: Mapping[str, Operands | str], contexts: Mapping[str, Floats | None], dtype: str) -> bool:
    """Whether a context errs by more than a kernel that rounds to a dtype of 16 bits."""
    for name, given in operands.items():
        context = contexts[name]
        if isinstance(given, str) or context is None:
            return False
        attended = attend(given)
        if context.size == attended.context.size and measured(given, attended, context, dtype)[0].over(LEAST).worst > 1:
            return True
    return False


def measured(given: Operands, attended: Attended, context: Floats, dtype: str) -> tuple[Sizes, float]:
    """The error of a context [feature] in units of what a dtype of 16 bits rounds, and what an error of 1 is of it."""
    exact = np.ravel(attended.context)[np.newaxis]
    spread = np.ravel(context_spread(given, attended))[np.newaxis]
    found = measure_errors(context[np.newaxis], exact, spread, dtype, UNIT_ROUNDOFF[dtype], given.values.shape[2])
    return found.sizes(0), float(found.relative[0])


__all__ = ["as_got", "measured"]
