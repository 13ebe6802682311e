"""The shape of an error that no cause explains: where it is, how it relates to prefill, since when, and who errs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvdrift.diagnosis.extent import part_of, tell_part
from kvdrift.diagnosis.guilt import guilty_pass
from kvdrift.diagnosis.model import Suspect, rounding_share
from kvdrift.diagnosis.relation import Sides, relation_of
from kvdrift.diagnosis.values import ComparedRows, attended_rows, cached_rows, rows_of
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.shapes import ErrorShape, Extent, Pass
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES

# A half dtype, and the share of elements with other bits that says that an error is in all of them.
_HALF, _TOUCHED = UNIT_ROUNDOFF["float16"], 0.9


def shape_of(suspect: Suspect, guilty: Pass | None = None) -> ErrorShape | None:
    """Return the shape of the difference at the first failing site; None if its values were not kept in both passes.

    `guilty` is the pass that other evidence found to be off, and stands where these values do not tell.
    """
    rows = rows_of(suspect)
    if rows is None or not rows.prefill.size:
        return None
    room = rows.room(suspect.unit)
    differs = rows.differs(room)
    if not differs.any():
        differs = rows.prefill != rows.decode
    bad = rows.bad(differs, is_cache=suspect.address.site in CACHE_SITES)
    if not len(bad):
        return None
    union = np.asarray(differs[bad].any(axis=0))
    part, hidden = part_of(union), 0
    if part.extent is Extent.SCATTERED and suspect.unit >= _HALF and _touches_all(rows, bad):
        # What is beyond rounding by itself lies anywhere, and the others were moved as well.
        part, hidden = part_of(np.ones_like(union)), int((~union).sum())
    is_cache, is_row = suspect.address.site in CACHE_SITES, suspect.address.site in ATTENTION_ROW_SITES
    sides = Sides(
        rows.prefill[bad], rows.decode[bad], part.mask, room[bad], suspect.unit, "slot" if is_cache else "position"
    )
    related = relation_of(sides, rounding_share(suspect.unit, *sides.inside))
    slots = tuple(rows.labels[i] for i in bad) if is_cache else ()
    positions = _failing(suspect)
    guilty = guilty_pass(suspect) or guilty
    where = tell_part(part, int(union.sum()), union.shape, "key" if is_row else "element")
    if hidden:
        where += f", of which rounding hides it in {hidden}"
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


def _touches_all(rows: ComparedRows, bad: Sequence[int]) -> bool:
    """Whether nearly all elements of the rows that fail have other bits. Two kernels that are right give another
    rounding in some elements of a row, since both round the same sums."""
    return bool((rows.prefill[bad] != rows.decode[bad]).mean() >= _TOUCHED)


def _failing(suspect: Suspect) -> tuple[int, ...]:
    """The positions at which the first failing site differs beyond rounding."""
    site, failing = suspect.address.site, {suspect.address.position}
    for position in suspect.others:
        if site in CACHE_SITES:
            rows = cached_rows(suspect, position)
        elif site in ATTENTION_ROW_SITES:
            rows = attended_rows(suspect, position)
        else:
            prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
            if prefill is None or decode is None or prefill.shape != decode.shape:
                continue
            rows = ComparedRows((position,), prefill.reshape(1, 1, -1), decode.reshape(1, 1, -1))
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
