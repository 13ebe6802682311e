"""Which of the two passes is off, where a pass's own values say what the failing one should have been.

A residual sum is the sum of its terms, a rotation keeps the length of each head, attention follows from its operands,
and a cached row is the one that was written. A pass that breaks such a rule at the first failing site is the one that
errs. Where both keep it, or both break it, nothing is said.
"""

from __future__ import annotations

import numpy as np

from kvdrift.diagnosis.model import Floats, Suspect, Values
from kvdrift.diagnosis.operands import dense_rows, operands_of
from kvdrift.replay.attention import attend
from kvdrift.vocabulary.shapes import Pass
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# A pass breaks a rule if it is off by so many unit roundoffs of the value's size, and by so many times more than the
# other pass.
_ROUNDINGS, _TIMES = 32.0, 8.0

_SUMS = {
    Site.RESID_ATTN: (Site.LAYER_IN, Site.ATTN_OUT),
    Site.LAYER_OUT: (Site.RESID_ATTN, Site.MLP_OUT),
}
_TURNED = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
_WRITTEN = {Site.K_CACHE: Site.K_ROPE, Site.V_CACHE: Site.V_PROJ}


def guilty_pass(suspect: Suspect) -> Pass | None:
    """Return the pass that breaks the rule of the first failing site, None if none or both do, or there is no rule."""
    site = suspect.address.site
    if site in CACHE_SITES:
        return _of_cache(suspect)
    off = [_broken(suspect, values) for values in (suspect.prefill, suspect.decode)]
    if off[0] is None or off[1] is None:
        return None
    return _larger(off[0], off[1], _ROUNDINGS * suspect.unit)


def _larger(prefill: float, decode: float, room: float) -> Pass | None:
    if decode > room and decode > _TIMES * prefill:
        return "decode"
    if prefill > room and prefill > _TIMES * decode:
        return "prefill"
    return None


def _off(found: Floats, wanted: Floats) -> float | None:
    """How far a value is from what it should be, relatively; None where that cannot be said."""
    size = float(np.linalg.norm(wanted))
    if found.shape != wanted.shape or not np.isfinite(found).all() or not size > 0.0 or not np.isfinite(size):
        return None
    return float(np.linalg.norm(found - wanted)) / size


def _broken(suspect: Suspect, values: Values) -> float | None:
    """By how much a pass breaks the rule of the first failing site."""
    site, position = suspect.address.site, suspect.address.position
    found = values.at(site, position)
    if found is None:
        return None
    if site in _SUMS:
        terms = [values.at(term, position) for term in _SUMS[site]]
        if any(term is None or term.size != found.size for term in terms):
            return None
        return _off(found.ravel(), np.sum([np.ravel(term) for term in terms if term is not None], axis=0))
    if site in _TURNED:
        before = next((v for term in _TURNED[site] if (v := values.at(term, position)) is not None), None)
        read = suspect.prefill.reads.get((Site.K_CACHE, position))
        if before is None or read is None or before.size != found.size or found.size % read.rows.shape[2]:
            return None
        lengths = [np.linalg.norm(v.reshape(-1, read.rows.shape[2]), axis=1) for v in (found, before)]
        return _off(lengths[0], lengths[1])
    if site in (Site.ATTN_CTX, Site.ATTN_PROBS):
        operands = operands_of(suspect, values)
        if operands is None or operands.attention.is_biased:
            return None
        attended = attend(operands)
        if site is Site.ATTN_CTX:
            return _off(found.ravel(), attended.context.ravel())
        rows, inside = dense_rows(values, site, position), operands.slots <= position
        return None if rows is None else _off(rows[:, operands.slots[inside]], attended.probs[:, inside])
    return None


def _of_cache(suspect: Suspect) -> Pass | None:
    """The pass whose cached row is not what prefill (of its own token: the pass itself) handed to the cache."""
    site, position = suspect.address.site, suspect.address.position
    off: dict[Pass, float] = {"prefill": 0.0, "decode": 0.0}
    seen = False
    for name, values in (("prefill", suspect.prefill), ("decode", suspect.decode)):
        read = values.reads.get((site, position))
        for slot in () if read is None else read.slots:
            writer = values if slot == position else suspect.prefill
            written = writer.at(_WRITTEN[site], int(slot))
            if read is None or written is None or written.size != read.rows[0].size:
                continue
            row = read.rows[int(np.searchsorted(read.slots, slot))].astype(np.float64).ravel()
            seen, this = True, _off(row, written.ravel())
            off[name] = max(off[name], np.inf if this is None else this)  # type: ignore[index]
    return _larger(off["prefill"], off["decode"], _ROUNDINGS * suspect.unit) if seen else None
