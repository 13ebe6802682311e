"""Values that are out of range in both passes alike: no difference behind them means anything."""

from __future__ import annotations

import numpy as np

from kvdrift.measure.measured import Measured
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES


def shared_overflow(measured: Measured, mode: str, first: Address | None) -> str | None:
    """Say where both passes hold NaN or infinity at or before a first failure at the native dtype, None if they do not.

    Without a first failure the engine itself must have seen that it ran out of range.

    Scores and probabilities do not count: a masked score is infinite by design, and both may be derived from their
    operands by the engine's recorder.
    """
    dtype = measured.info.dtype
    rows = measured.table.select(mode, dtype)
    shared = (rows.n_nonfinite > 0) & np.isfinite(rows.max_abs) & ~rows.is_at(*ATTENTION_ROW_SITES)
    named, index = _named(measured), None if first is None else rows.index(first)
    limit = np.inf if index is None else rows.rank[index]
    found = np.flatnonzero(shared & (rows.rank <= limit))
    if not len(found) or (first is None and named is None):
        return None
    address = rows.addresses(found[np.argmin(rows.rank[found])][None])[0]
    return (
        f"{dtype} runs out of range in both passes: {named or 'values are NaN or infinite'} "
        f"({address} in prefill and in decode), so nothing behind it can be compared. It is no question of the cache; "
        "run the model in bfloat16 or float32, or scale what overflows"
    )


def _named(measured: Measured) -> str | None:
    """The first place at which a call at the native dtype ran out of range, as its engine saw it."""
    for route in measured.routes:
        if route.rung == measured.info.dtype:
            for call in route.prefill:
                if call.overflow is not None:
                    return f"the first value that is NaN or infinite is at {call.overflow} of {route.prompt}"
    return None
