"""The shape of an error that no cause explains: where it is, how it relates to prefill, since when, and who errs."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.extent import part_of, tell_part
from kvdrift.diagnosis.guilt import guilty_pass
from kvdrift.diagnosis.model import Bools, Floats, Suspect, rounding_share
from kvdrift.diagnosis.operands import both_rows
from kvdrift.diagnosis.relation import Sides, relation_of
from kvdrift.vocabulary.shapes import ErrorShape, Pass
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
class _Rows:
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


def shape_of(suspect: Suspect, guilty: Pass | None = None) -> ErrorShape | None:
    """Return the shape of the difference at the first failing site; None if its values were not kept in both passes.

    `guilty` is the pass that other evidence found to be off, and stands where these values do not tell.
    """
    rows = _rows(suspect)
    if rows is None or not rows.prefill.size:
        return None
    room = rows.room(suspect.unit)
    differs = rows.differs(room)
    if not differs.any():
        differs = rows.prefill != rows.decode
    bad = _bad_rows(rows, differs, suspect.address.site in CACHE_SITES)
    if not len(bad):
        return None
    union = np.asarray(differs[bad].any(axis=0))
    part = part_of(union)
    is_cache, is_row = suspect.address.site in CACHE_SITES, suspect.address.site in ATTENTION_ROW_SITES
    sides = Sides(
        rows.prefill[bad], rows.decode[bad], part.mask, room[bad], suspect.unit, "slot" if is_cache else "position"
    )
    related = relation_of(sides, rounding_share(suspect.unit, *sides.inside))
    slots = tuple(rows.labels[i] for i in bad) if is_cache else ()
    positions = _failing(suspect)
    guilty = guilty_pass(suspect) or guilty
    where = tell_part(part, int(union.sum()), union.shape, "key" if is_row else "element")
    if is_cache:
        where += f" of {_slots_in_words(slots, rows.labels)}"
    text = f"the error is {where}; {related.text}"
    if related.explained:
        text += f" ({related.explained:.1%} of the difference)"
    text += f"; {_when(positions, suspect.positions)}"
    if guilty is not None:
        text += f"; {guilty} is the pass that is off"
    return ErrorShape(
        extent=part.extent,
        heads=part.heads,
        elements=part.elements,
        slots=() if slots == rows.labels else slots,
        relation=related.relation,
        size=related.size,
        explained=min(1.0, related.explained),
        positions=positions,
        guilty=guilty,
        text=text,
    )


def _rows(suspect: Suspect) -> _Rows | None:
    site, position = suspect.address.site, suspect.address.position
    if site in CACHE_SITES:
        return _cached(suspect, position)
    if site in ATTENTION_ROW_SITES:
        return _attended(suspect, position)
    heads = _head_count(suspect, site)
    found = {}
    for at in suspect.positions:
        prefill, decode = suspect.prefill.at(site, at), suspect.decode.at(site, at)
        if prefill is not None and decode is not None and prefill.shape == decode.shape:
            found[at] = prefill.ravel(), decode.ravel()
    sizes = {len(pair[0]) for pair in found.values()}
    if len(sizes) != 1 or sizes == {0} or position not in found:
        return None
    shape = (len(found), heads, -1)
    return _Rows(tuple(found), *(np.stack([pair[i] for pair in found.values()]).reshape(shape) for i in (0, 1)))


def _head_count(suspect: Suspect, site: Site) -> int:
    """How many heads a vector has, 1 if that is not known."""
    read = suspect.prefill.reads.get((_OF_HEADS.get(site, site), suspect.address.position))
    value = suspect.prefill.at(site, suspect.address.position)
    if site not in _OF_HEADS or read is None or value is None or value.size % read.rows.shape[2]:
        return 1
    return int(value.size // read.rows.shape[2])


def _cached(suspect: Suspect, position: int) -> _Rows | None:
    prefill, decode = (v.reads.get((suspect.address.site, position)) for v in (suspect.prefill, suspect.decode))
    if prefill is None or decode is None or prefill.rows.shape[1:] != decode.rows.shape[1:]:
        return None
    slots = np.intersect1d(prefill.slots, decode.slots)
    both = (read.rows[np.searchsorted(read.slots, slots)].astype(np.float64) for read in (prefill, decode))
    return _Rows(tuple(int(slot) for slot in slots), *both)


def _attended(suspect: Suspect, position: int) -> _Rows | None:
    """Rows of scores or probabilities over the keys that a pass sees; a key that one alone hides is infinitely off."""
    rows = both_rows(suspect, suspect.address.site, position)
    if rows is None:
        return None
    seen = ~(np.isneginf(rows[0]) & np.isneginf(rows[1])).all(axis=0)
    if not seen.any():
        return None
    hidden = np.isneginf(rows[0]) & np.isneginf(rows[1])
    prefill, decode = (np.where(hidden, 0.0, row)[None] for row in rows)
    return _Rows((position,), prefill, decode)


def _bad_rows(rows: _Rows, differs: Bools, is_cache: bool) -> list[int]:
    """Indices of rows that differ; of cached ones not those that rounding alone moved beside one that holds another."""
    found = np.flatnonzero(differs.any(axis=(1, 2)))
    if not is_cache:
        return [int(i) for i in found]
    with np.errstate(invalid="ignore"):
        off = ((rows.decode - rows.prefill) ** 2).sum(axis=(1, 2))
    off = np.where(np.isfinite(off), off, np.inf)
    largest = off[np.isfinite(off)].max(initial=0.0)
    return [int(i) for i in found if off[i] > _BESIDE**2 * largest]


def _failing(suspect: Suspect) -> tuple[int, ...]:
    """The positions at which the first failing site differs beyond rounding."""
    site, failing = suspect.address.site, {suspect.address.position}
    for position in suspect.others:
        if site in CACHE_SITES:
            rows = _cached(suspect, position)
        elif site in ATTENTION_ROW_SITES:
            rows = _attended(suspect, position)
        else:
            prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
            if prefill is None or decode is None or prefill.shape != decode.shape:
                continue
            rows = _Rows((position,), prefill.reshape(1, 1, -1), decode.reshape(1, 1, -1))
        if rows is not None and rows.prefill.size and rows.differs(rows.room(suspect.unit)).any():
            failing.add(position)
    return tuple(sorted(failing))


def _when(failing: tuple[int, ...], probed: tuple[int, ...]) -> str:
    first = probed.index(failing[0]) + 1
    if len(failing) == len(probed):
        return "at every step" if len(probed) > 1 else f"at position {failing[0]}, the only one probed"
    if failing == probed[first - 1 :] and len(failing) > 1:
        return f"from position {failing[0]} on, step {first} of {len(probed)}"
    listed = ", ".join(str(p) for p in failing[:6]) + (" ..." if len(failing) > 6 else "")
    alone = f"at position {listed} alone" if len(failing) == 1 else f"at the positions {listed}"
    return f"{alone} of {len(probed)} probed"


def _slots_in_words(slots: tuple[int, ...], read: tuple[int, ...]) -> str:
    if len(slots) == 1:
        return f"slot {slots[0]}"
    if slots == read:
        return f"all {len(slots)} slots"
    if slots == read[-len(slots) :]:
        return f"the slots from {slots[0]} on"
    if slots[-1] - slots[0] == len(slots) - 1:
        return f"the slots {slots[0]} to {slots[-1]}"
    return "the slots " + ", ".join(str(slot) for slot in slots[:8]) + (" ..." if len(slots) > 8 else "")
