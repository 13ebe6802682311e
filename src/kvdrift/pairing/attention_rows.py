"""Attention rows of two passes, brought to the same keys and to one dtype before they are compared."""

from __future__ import annotations

from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.kernels import as_floats
from kvdrift.pairing.reads import masked
from kvdrift.pairing.relabel import Order
from kvdrift.trace.model import Array, Slots
from kvdrift.vocabulary.sites import Site

# By what share of themselves contexts may differ where probabilities have other totals, and by what share of what those
# change.
_NEAR, _LEFT_MOST = 1.0 / 16.0, 1.0 / 8.0
# By so many roundings the total of a softmax may be off from 1.
_ROUNDINGS = 16.0


class Row(NamedTuple):
    """One row, and the slots of its keys where it is one of attention."""

    values: Array
    slots: Slots | None


def _is_zero(probabilities: Array) -> NDArray[np.bool_]:
    return np.asarray(probabilities == 0)


def by_slot(site: Site, prefill: Row, decode: Row) -> tuple[Array, Array] | None:
    """Two attention rows [head, key] with a place for every slot that one of them has; a key that a row lacks is a
    masked one. None if these are no such rows."""
    if prefill.slots is None or decode.slots is None or prefill.values.shape[:-1] != decode.values.shape[:-1]:
        return None
    absent = -np.inf if site is Site.ATTN_SCORES else 0.0
    n_keys = 1 + int(max(prefill.slots.max(initial=-1), decode.slots.max(initial=-1)))
    rows = []
    for row in (prefill, decode):
        full = np.full((*row.values.shape[:-1], n_keys), absent, dtype=row.values.dtype)
        full[..., row.slots] = row.values
        rows.append(full)
    return rows[0], rows[1]


def same_keys(
    site: Site, prefill: Row, decode: Row, rows: tuple[Array, Array] | None, order: Order | None
) -> tuple[Array, Array, int]:
    """Bring two attention rows [head, key], of which `rows` are those by slot, to the same keys: those that one of them
    sees; `order` is decode's.

    Keys that one side sees and the other does not are returned as the count.
    """
    if rows is None:
        return prefill.values, decode.values, 0
    if order is not None and len(order) == rows[1].shape[-1]:
        rows = rows[0], rows[1][..., order]
    is_hidden = masked if site is Site.ATTN_SCORES else _is_zero
    first = second = is_hidden(rows[0])
    if rows[0].dtype != rows[1].dtype or rows[0].tobytes() != rows[1].tobytes():
        second = is_hidden(rows[1])
    keep = ~(first & second).all(axis=0)
    n_lost = int((first != second).any(axis=0).sum()) if site is Site.ATTN_SCORES and first is not second else 0
    if keep.all():
        return rows[0], rows[1], n_lost
    return rows[0][..., keep], rows[1][..., keep], n_lost


def same_dtype(prefill: Array, decode: Array) -> tuple[Array, Array]:
    """Round both to the narrower dtype: what attention functions compute inside is theirs to choose, and how finely one
    of them keeps its scores, or a head its logits, is not a difference between the passes."""
    if prefill.dtype == decode.dtype or prefill.dtype.itemsize == decode.dtype.itemsize:
        return prefill, decode
    narrow = min(prefill.dtype, decode.dtype, key=lambda dtype: dtype.itemsize)
    with np.errstate(over="ignore", invalid="ignore"):
        return prefill.astype(narrow), decode.astype(narrow)


def is_wider_than(rung: str, prefill: Array, decode: Array) -> bool:
    """Whether one pass keeps rows in the dtype of the `rung` and the other in a wider one, such as a residual stream
    of a model of 16 bits that is kept in float32. What is narrower than the rung is no choice of a pass."""
    sides = sorted((prefill.dtype, decode.dtype), key=lambda dtype: dtype.itemsize)
    return sides[0].name == rung and sides[0].itemsize < sides[1].itemsize


def at_totals(prefill: Array, decode: Array, contexts: tuple[Array, Array] | None) -> Array:
    """Return decode's probabilities [head, key] with the total that each head has in prefill, where nothing else
    differs and the `contexts` of the two change by less than an eighth of what that changes.

    A sink may take its part of a softmax, or of what comes out of it: `p v s / (s + e^sink)` is the same either way. So
    one of the two has a total of 1 in each head, and the other less. What is not finite, or differs otherwise, stays
    as it is.
    """
    if contexts is None or prefill.ndim != 2 or prefill.shape != decode.shape or contexts[0].shape != contexts[1].shape:
        return decode
    if prefill.tobytes() == decode.tobytes():
        return decode
    first, second, right, wrong = (as_floats(rows) for rows in (prefill, decode, *contexts))
    totals = first.sum(axis=1), second.sum(axis=1)
    if not all(np.isfinite(total).all() and (total > 0.0).all() for total in totals):
        return decode
    room = _ROUNDINGS * max(float(ml_dtypes.finfo(rows.dtype).eps) for rows in (prefill, decode))  # type: ignore[no-untyped-call]
    if (np.abs(np.maximum(*totals) - 1.0) > room).any():
        return decode
    factors = totals[0] / totals[1]
    made = second * factors[:, None]
    room = min(_NEAR, _LEFT_MOST * float(np.sqrt(np.mean((factors - 1.0) ** 2))))
    is_factor = np.linalg.norm(made - first) <= _LEFT_MOST * np.linalg.norm(second - first)
    if not (is_factor and np.linalg.norm(wrong - right) <= room * np.linalg.norm(right)):
        return decode
    return np.asarray(made.astype(decode.dtype))
