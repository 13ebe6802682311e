"""Explanations of wrong rows in the cache: whose row a slot holds, or what was done to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain

import numpy as np

from kvdrift.diagnosis.altered import explain_alterations
from kvdrift.diagnosis.model import EXACT, GENERAL, Candidate, Floats, Indices, Suspect, share
from kvdrift.diagnosis.storage import explain_storage
from kvdrift.trace.model import Slots
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# A row that differs by less than this share of the one that differs most is taken for rounding beside the fault.
_ROUNDING_BESIDE = 1e-2
# Rows that point as the right ones do, up to this cosine, are the right ones in another form and not others.
_UNRELATED = 0.9


@dataclass(frozen=True, slots=True)
class SharedRows:
    """The rows of K or V that both passes read.

    Attributes:
        slots: logical positions [slot].
        prefill: rows [slot, head, dim] as prefill reads them.
        decode: the same as decode reads them.
        bad: indices of the slots to be explained.
        all_differ: whether every row differs, decode's own included.
    """

    slots: Slots
    prefill: Floats
    decode: Floats
    bad: Indices
    all_differ: bool


def shared_rows(suspect: Suspect) -> SharedRows | None:
    """Return the rows that both passes read at the first failing position.

    None if a pass read no rows there, or their shapes differ.

    Rows that decode did not write itself come first: only if they are all right is its own the bad one. A row with
    NaN or infinity in either pass differs.
    """
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = (v.reads.get((site, position)) for v in (suspect.prefill, suspect.decode))
    if prefill is None or decode is None or prefill.rows.shape[1:] != decode.rows.shape[1:]:
        return None
    slots = np.intersect1d(prefill.slots, decode.slots)
    rows = prefill.rows[np.searchsorted(prefill.slots, slots)].astype(np.float64)
    read = decode.rows[np.searchsorted(decode.slots, slots)].astype(np.float64)
    moved = ((read - rows) ** 2).sum(axis=(1, 2))
    # Rows that came by another route, as in `as_designed`, carry rounding, which is not to be explained.
    with np.errstate(invalid="ignore"):
        differs = (moved > _ROUNDING_BESIDE**2 * moved.max(initial=0.0)) | ~np.isfinite(moved)
    past = np.flatnonzero(differs & (slots < position))
    bad = past if len(past) else np.flatnonzero(differs)
    return SharedRows(slots, rows, read, bad, bool(differs.all()))


def explain_slots(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened to the rows that decode read."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = (v.reads.get((site, position)) for v in (suspect.prefill, suspect.decode))
    if site not in CACHE_SITES or prefill is None or decode is None:
        return
    needed = _needed(suspect, prefill.slots)
    lost = np.setdiff1d(needed, decode.slots)
    if len(lost):
        yield Candidate(1.0, *_lost(lost, needed, position), EXACT, tuple(lost.tolist()))
    shared = shared_rows(suspect)
    if shared is None or not len(shared.bad) or not np.isfinite(shared.decode[shared.bad]).all():
        return
    slots, rows, read, bad = shared.slots, shared.prefill, shared.decode, shared.bad
    found = chain(
        _whole_rows(suspect, site, slots, rows, read, bad),
        () if shared.all_differ else _foreign(suspect, site, slots, rows, read, bad),
        _parts(slots, rows, read, bad, is_new=slots[bad].tolist() == [position]),
        _transposed(site, rows, read, bad),
        explain_storage("key" if site is Site.K_CACHE else "value", rows, read, bad, suspect.rung),
        explain_alterations("key" if site is Site.K_CACHE else "value", slots, rows, read, bad, suspect.rung),
    )
    named = () if shared.all_differ else tuple(int(slot) for slot in slots[bad])
    yield from (replace(candidate, slots=named) for candidate in found)


def _needed(suspect: Suspect, slots: Slots) -> Slots:
    """The slots that prefill attends to: those that its mask leaves visible, by the window where no scores were
    captured. A row that has left the window may be dropped."""
    position, window = suspect.address.position, None if suspect.spec is None else suspect.spec.window
    place = Site.ATTN_SCORES, position
    scores, of_scores = suspect.prefill.at(*place), suspect.prefill.slots.get(place)
    if scores is not None and of_scores is not None and scores.shape[-1] == len(of_scores):
        slots = np.intersect1d(slots, of_scores[~np.isneginf(scores).all(axis=0)])
    elif window is not None:
        slots = slots[slots > position - window]
    return slots[slots <= position]


def _transposed(site: Site, rows: Floats, read: Floats, bad: Indices) -> Iterator[Candidate]:
    """Memory laid out as [slot, head, dim] is read as [head, slot, dim], or the other way round."""
    n_slots, heads, dim = rows.shape
    if heads == 1:
        return
    name = "K" if site is Site.K_CACHE else "V"
    cause = Cause.K_TRANSPOSED if site is Site.K_CACHE else Cause.V_TRANSPOSED
    text = f"{name} is read with heads and slots exchanged"
    for predicted in (
        rows.reshape(heads, n_slots, dim).transpose(1, 0, 2),
        rows.transpose(1, 0, 2).reshape(n_slots, heads, dim),
    ):
        yield Candidate(share(rows[bad], read[bad], predicted[bad]), cause, text, EXACT)


def _lost(lost: Slots, needed: Slots, position: int) -> tuple[Cause, str]:
    if list(lost) == [position]:
        return Cause.KEY_LOST_LAST, f"decode does not read the row of its own token, slot {position}"
    if np.array_equal(lost, np.sort(needed)[: len(lost)]):
        return Cause.KEY_LOST_FIRST, f"decode does not read the first {len(lost)} of the rows that prefill attends to"
    return Cause.KEY_LOST_MIDDLE, f"decode does not read the slots {lost.tolist()}"


def _whole_rows(
    suspect: Suspect, site: Site, slots: Slots, rows: Floats, read: Floats, bad: Indices
) -> Iterator[Candidate]:
    """Every bad row is a row of another slot, of the other half of the cache, or nothing."""
    name = "K" if site is Site.K_CACHE else "V"
    yield Candidate(
        share(rows[bad], read[bad], np.zeros_like(rows[bad])),
        Cause.SLOT_ZERO,
        f"the slots {_list(slots[bad])} hold zeros",
    )
    flat = rows.reshape(len(rows), -1)
    nearest = [int(np.argmin(((flat - row.ravel()) ** 2).sum(axis=1))) for row in read[bad]]
    pairs = [(int(slots[b]), int(slots[n])) for b, n in zip(bad, nearest, strict=True)]
    cause, text = (
        Cause.SLOT_ALIASED,
        "; ".join(f"slot {slot} holds the {name} of slot {source}" for slot, source in pairs[:4]),
    )
    shifts = {slot - source for slot, source in pairs}
    if len(pairs) > 2 and len(shifts) == 1:
        cause, text = (
            (Cause.SLOTS_SHIFTED if site is Site.K_CACHE else Cause.V_PERMUTED),
            f"{len(pairs)} slots hold the {name} of the slot {shifts.pop():+d} before them",
        )
    elif len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        cause, text = (
            (Cause.SLOTS_SWAPPED if site is Site.K_CACHE else Cause.V_PERMUTED),
            f"the slots {pairs[0][0]} and {pairs[0][1]} hold each other's {name}",
        )
    if site is Site.V_CACHE and len(set(nearest)) == len(nearest) > 2:
        cause = Cause.V_PERMUTED
    yield Candidate(share(rows[bad], read[bad], rows[nearest]), cause, text)
    yield from _of_other_layer(suspect, site, slots, rows, read, bad)
    other = suspect.prefill.reads.get(
        (Site.V_CACHE if site is Site.K_CACHE else Site.K_CACHE, suspect.address.position)
    )
    if other is not None and other.rows.shape[1:] == rows.shape[1:]:
        found = other.rows[np.searchsorted(other.slots, slots[bad])].astype(np.float64)
        cause = Cause.V_READ_AS_K if site is Site.K_CACHE else Cause.K_READ_AS_V
        text = f"{name} rows are taken from the other half of the cache"
        yield Candidate(share(rows[bad], read[bad], found), cause, text, EXACT)


def _of_other_layer(
    suspect: Suspect, site: Site, slots: Slots, rows: Floats, read: Floats, bad: Indices
) -> Iterator[Candidate]:
    """Rows are those of the same slots of another layer."""
    for other in suspect.neighbours:
        if (
            other.site is not site
            or other.rows.shape[1:] != rows.shape[1:]
            or not np.isin(slots[bad], other.slots).all()
        ):
            continue
        found = other.rows[np.searchsorted(other.slots, slots[bad])].astype(np.float64)
        if not found.any():
            continue  # rows of zeros are nobody's
        text = f"the slots {_list(slots[bad])} hold the rows of layer {other.layer}"
        yield Candidate(share(rows[bad], read[bad], found), Cause.KV_OF_OTHER_LAYER, text, EXACT)


def _foreign(
    suspect: Suspect, site: Site, slots: Slots, rows: Floats, read: Floats, bad: Indices
) -> Iterator[Candidate]:
    """The last resort for whole rows: some rows, and not all, stand in the place of what prefill wrote and resemble
    none of it. Rows at the start may resemble it: another request's prefix is of nearly the same content where only
    the weights were others. Its share is what replacing just these rows removes, less a little, so that every
    explanation of their content comes first."""
    if not (read[bad] != rows[bad]).any(axis=(0, 1)).all():
        return
    # Of the row of this step it is known that another one is read for it where the one that was written is known.
    if slots[bad].tolist() == [suspect.address.position] and not _is_written(suspect, site, rows[bad[0]]):
        return
    untouched = [b for b in range(len(rows)) if b not in set(bad.tolist())]
    from_the_start = len(bad) > 1 and list(bad) == list(range(len(bad)))
    right, wrong = rows[bad].reshape(len(bad), -1), read[bad].reshape(len(bad), -1)
    size = np.linalg.norm(right, axis=1) * np.linalg.norm(wrong, axis=1)
    alike = np.divide((right * wrong).sum(axis=1), size, out=np.ones_like(size), where=size > 0.0)
    if not from_the_start and float(alike.max()) > _UNRELATED:
        return
    cause = Cause.SLOT_STALE if len(untouched) > 1 and not from_the_start else Cause.PREFIX_STALE
    name = "K" if site is Site.K_CACHE else "V"
    text = (
        f"the slots {_list(slots[bad])} hold {name} rows that prefill wrote nowhere in this layer: stale, or of "
        "another sequence"
    )
    yield Candidate(0.9991, cause, text, GENERAL)


def stores_its_record(suspect: Suspect) -> bool:
    """Whether the row of its own token that prefill reads is what was recorded in front of the cache; False if it is
    not known."""
    site, position = suspect.address.site, suspect.address.position
    read = suspect.prefill.reads.get((site, position))
    if site not in CACHE_SITES or read is None or position not in read.slots:
        return False
    return _is_written(suspect, site, read.rows[int(np.searchsorted(read.slots, position))].astype(np.float64))


def _is_written(suspect: Suspect, site: Site, row: Floats) -> bool:
    """Whether what was recorded in front of the cache is what is stored there: prefill's own `row` [head, dim] is then
    that of its record. What lies between a projection and the cache (an adapter, a norm, a scale) makes it another."""
    place = Site.K_ROPE if site is Site.K_CACHE else Site.V_PROJ, suspect.address.position
    given, written = suspect.prefill.at(*place), suspect.decode.at(*place)
    if given is None or written is None:
        return False
    # Heads of the cache may be copies, one for each query head of a group.
    size = given.size // row.shape[1]
    if given.size % row.shape[1] or row.shape[0] % size:
        return False
    copies = np.repeat(given.reshape(size, -1), row.shape[0] // size, axis=0)
    return float(np.linalg.norm(copies - row)) <= _ROUNDING_BESIDE * float(np.linalg.norm(row))


def _parts(slots: Slots, rows: Floats, read: Floats, bad: Indices, *, is_new: bool) -> Iterator[Candidate]:
    """Only some heads or elements of the bad rows differ: they are those of another row, or the heads are reordered.

    A row that `is_new` was written in this step, so that no part of it is known to be older.
    """
    heads = rows.shape[1]
    if heads > 1:
        flat = rows[bad].transpose(1, 0, 2).reshape(heads, -1)
        wanted = read[bad].transpose(1, 0, 2).reshape(heads, -1)
        nearest = np.argmin(((wanted[:, None] - flat[None]) ** 2).sum(axis=2), axis=1)
        if not np.array_equal(nearest, np.arange(heads)):
            predicted = rows[bad][:, nearest]
            # One head in the place of several is a wrong mapping of heads, not another order of them.
            permuted = len(set(nearest.tolist())) == heads
            yield Candidate(
                share(rows[bad], read[bad], predicted),
                Cause.KV_HEADS_PERMUTED if permuted else Cause.HEAD_GROUP_WRONG,
                f"kv heads are read in the order {nearest.tolist()}",
            )
    differs = (rows[bad] != read[bad]).any(axis=(0, 1))
    zeroed = rows[bad].copy()
    zeroed[..., np.flatnonzero(differs)] = 0.0
    if 0 < differs.sum() < rows.shape[2]:
        name = f"elements {np.flatnonzero(differs)[0]} to {np.flatnonzero(differs)[-1]} of {len(bad)} rows are zero"
        yield Candidate(share(rows[bad], read[bad], zeroed), Cause.K_TAIL_DIMS_LOST, name)
        text = f"only part of the rows of the slots {_list(slots[bad])} is what prefill wrote"
        if not is_new:
            yield Candidate(0.9991, Cause.SLOT_HALF_STALE, text, GENERAL)
    if 0 < differs.sum() < rows.shape[2]:
        elements = np.flatnonzero(differs)
        # Of one row in the place of all, the one nearest to their mean leaves the least squares over.
        gaps = ((rows[..., elements] - read[bad][..., elements].mean(axis=0)) ** 2).sum(axis=(1, 2))
        source = int(np.argmin(np.where(np.isnan(gaps), np.inf, gaps)))
        predicted = rows[bad].copy()
        predicted[..., elements] = rows[source][None][..., elements]
        yield Candidate(
            share(rows[bad], read[bad], predicted),
            Cause.SLOT_HALF_STALE,
            f"elements {elements[0]} to {elements[-1]} of the slots {_list(slots[bad])} are those of slot "
            f"{int(slots[source])}",
        )


def _list(slots: Slots) -> str:
    return ", ".join(str(int(slot)) for slot in slots[:6]) + (" ..." if len(slots) > 6 else "")
