"""The values of the first failing site of both passes as one array: [row, head, element]."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import Bools, Floats, Suspect
from kvdrift.diagnosis.operands import both_rows
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, Site

_OF_HEADS = {
    Site.Q_PROJ: Site.K_CACHE,
    Site.Q_NORM: Site.K_CACHE,
    Site.Q_ROPE: Site.K_CACHE,
    Site.K_PROJ: Site.K_CACHE,
    Site.K_NORM: Site.K_CACHE,
    Site.K_ROPE: Site.K_CACHE,
    Site.V_PROJ: Site.V_CACHE,
    Site.ATTN_CTX: Site.V_CACHE,
}
# Unit roundoffs, of the size of a row, that an element may be off by; far more than any kernel, and far less than an
# error that was told from rounding.
_ROUNDINGS = 8.0
# An element or a cached row that is off by less than this share of the one that is off most is rounding beside it.
_BESIDE = 1e-2


@dataclass(frozen=True, slots=True)
class ComparedRows:
    """Both passes, [row, head, element], by position or by slot of the cache."""

    labels: tuple[int, ...]
    prefill: Floats
    decode: Floats

    def room(self, unit: float) -> Floats:
        """By how much rounding may move an element of each row, [row]."""
        sizes = [np.where(np.isfinite(v), v, 0.0) for v in (self.prefill, self.decode)]
        return np.asarray(_ROUNDINGS * unit * np.sqrt(sum((v**2).mean(axis=(1, 2)) for v in sizes)))

    def differs(self, room: Floats) -> Bools:
        """Which elements are further apart than rounding, [row, head, element]."""
        with np.errstate(invalid="ignore"):
            off = np.abs(self.decode - self.prefill)
        off = np.where(np.isfinite(off), off, np.inf)
        off[self.prefill == self.decode] = 0.0
        off[np.isnan(self.prefill) & np.isnan(self.decode)] = 0.0
        known = np.where(np.isfinite(off), off, 0.0)
        least = np.maximum(room[:, None, None], _BESIDE * known.max(axis=(1, 2), keepdims=True))
        return np.asarray(off > least)

    def bad(self, differs: Bools, *, is_cache: bool) -> list[int]:
        """Return the indices of rows that differ; of cached ones not those that rounding moved beside a wrong one."""
        found = np.flatnonzero(differs.any(axis=(1, 2)))
        if not is_cache:
            return [int(i) for i in found]
        with np.errstate(invalid="ignore"):
            off = ((self.decode - self.prefill) ** 2).sum(axis=(1, 2))
        off = np.where(np.isfinite(off), off, np.inf)
        largest = off[np.isfinite(off)].max(initial=0.0)
        return [int(i) for i in found if off[i] > _BESIDE**2 * largest]


def rows_of(suspect: Suspect) -> ComparedRows | None:
    """Return the values of both passes: vectors of all positions, cached rows or keys of the one that failed first.

    None if a pass lacks them, or their shapes differ.
    """
    site, position = suspect.address.site, suspect.address.position
    if site in CACHE_SITES:
        return cached_rows(suspect, position)
    if site in ATTENTION_ROW_SITES:
        return attended_rows(suspect, position)
    heads = head_count(suspect, site)
    found = {}
    for at in suspect.positions:
        prefill, decode = suspect.prefill.at(site, at), suspect.decode.at(site, at)
        if prefill is not None and decode is not None and prefill.shape == decode.shape:
            found[at] = prefill.ravel(), decode.ravel()
    sizes = {len(pair[0]) for pair in found.values()}
    if len(sizes) != 1 or sizes == {0} or position not in found:
        return None
    shape = (len(found), heads, -1)
    return ComparedRows(tuple(found), *(np.stack([pair[i] for pair in found.values()]).reshape(shape) for i in (0, 1)))


def head_count(suspect: Suspect, site: Site) -> int:
    """How many heads a vector has, 1 if that is not known."""
    read = suspect.prefill.reads.get((_OF_HEADS.get(site, site), suspect.address.position))
    value = suspect.prefill.at(site, suspect.address.position)
    if site not in _OF_HEADS or read is None or value is None or value.size % read.rows.shape[2]:
        return 1
    return int(value.size // read.rows.shape[2])


def cached_rows(suspect: Suspect, position: int) -> ComparedRows | None:
    """Return the rows of the slots that both passes read at a position."""
    prefill, decode = (v.reads.get((suspect.address.site, position)) for v in (suspect.prefill, suspect.decode))
    if prefill is None or decode is None or prefill.rows.shape[1:] != decode.rows.shape[1:]:
        return None
    slots = np.intersect1d(prefill.slots, decode.slots)
    both = (read.rows[np.searchsorted(read.slots, slots)].astype(np.float64) for read in (prefill, decode))
    return ComparedRows(tuple(int(slot) for slot in slots), *both)


def attended_rows(suspect: Suspect, position: int) -> ComparedRows | None:
    """Return rows of scores or probabilities over the keys that a pass sees; one that a pass alone hides is -inf."""
    rows = both_rows(suspect, suspect.address.site, position)
    if rows is None:
        return None
    seen = ~(np.isneginf(rows[0]) & np.isneginf(rows[1])).all(axis=0)
    if not seen.any():
        return None
    hidden = np.isneginf(rows[0]) & np.isneginf(rows[1])
    prefill, decode = (np.where(hidden, 0.0, row)[None] for row in rows)
    return ComparedRows((position,), prefill, decode)
