"""What a pass attended with, and its rows of scores and probabilities by key, ready to be replayed."""

from __future__ import annotations

import numpy as np

from kvdrift.diagnosis.model import Floats, Suspect, Values
from kvdrift.replay.attention import Operands
from kvdrift.vocabulary.sites import Site


def operands_of(suspect: Suspect, values: Values) -> Operands | None:
    """Return what a pass attended with at the first failing position, in float64, None if it was not captured.

    The query is [head, dim], keys and values are [slot, head, dim], with as many heads as the cache has. NaN stays NaN.
    """
    position = suspect.address.position
    query, spec = values.at(Site.Q_ROPE, position), suspect.spec
    keys, rows = (values.reads.get((site, position)) for site in (Site.K_CACHE, Site.V_CACHE))
    if query is None or spec is None or keys is None or rows is None or query.size % keys.rows.shape[2]:
        return None
    if not np.array_equal(keys.slots, rows.slots):
        return None
    return Operands(
        query.reshape(-1, keys.rows.shape[2]),
        keys.rows.astype(np.float64),
        rows.rows.astype(np.float64),
        keys.slots,
        position,
        spec,
    )


def dense_rows(values: Values, site: Site, position: int) -> Floats | None:
    """Return the scores or probabilities [head, key] of one position over the keys 0 to `position`.

    Keys that are masked or were not recorded have -inf (scores) or 0 (probabilities); NaN stays NaN. None if the site
    was not captured.
    """
    row, slots = values.at(site, position), values.slots.get((site, position))
    if row is None or slots is None:
        return None
    full = np.full((row.shape[0], position + 1), -np.inf if site is Site.ATTN_SCORES else 0.0)
    inside = slots <= position
    full[:, slots[inside]] = row[:, inside]
    return full


def both_rows(suspect: Suspect, site: Site, position: int | None = None) -> tuple[Floats, Floats] | None:
    """Return the rows [head, key] of prefill and decode at a position, by default that of the first failure.

    See `dense_rows`; None unless both passes have rows of the same shape.
    """
    position = suspect.address.position if position is None else position
    first, second = (dense_rows(values, site, position) for values in (suspect.prefill, suspect.decode))
    if first is None or second is None or first.shape != second.shape:
        return None
    return first, second


def capped(raw: Floats, softcap: float | None) -> Floats:
    """Return scores of any shape under a softcap; None caps nothing. NaN stays NaN, and -inf becomes -softcap."""
    return raw if softcap is None else softcap * np.tanh(raw / softcap)
