"""Explanations of wrong rows in the cache: whose row a slot holds, or what was done to it."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from kvdrift.diagnosis.model import Candidate, Floats, Suspect, share
from kvdrift.diagnosis.plain import ROUNDED, SHORT
from kvdrift.sites import CACHE_SITES, Site
from kvdrift.trace.model import Slots

Indices = NDArray[np.intp]


def explain_slots(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what could have happened to the rows that decode read."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = (v.reads.get((site, position)) for v in (suspect.prefill, suspect.decode))
    if site not in CACHE_SITES or prefill is None or decode is None:
        return
    window = None if suspect.spec is None else suspect.spec.window
    oldest = 0 if window is None else position - window + 1  # a row that has left the window may be dropped
    needed = prefill.slots[(prefill.slots >= oldest) & (prefill.slots <= position)]
    lost = np.setdiff1d(needed, decode.slots)
    if len(lost):
        yield Candidate(1.0, *_lost(lost, position))
    slots = np.intersect1d(prefill.slots, decode.slots)
    rows = prefill.rows[np.searchsorted(prefill.slots, slots)].astype(np.float64)
    read = decode.rows[np.searchsorted(decode.slots, slots)].astype(np.float64)
    bad = np.flatnonzero((read != rows).any(axis=(1, 2)) & (slots < position))
    if not len(bad):
        bad = np.flatnonzero((read != rows).any(axis=(1, 2)))
    if not len(bad) or not np.isfinite(read[bad]).all():
        return
    yield from _whole_rows(suspect, site, slots, rows, read, bad)
    yield from _parts(slots, rows, read, bad)
    name = "key" if site is Site.K_CACHE else "value"
    for dtype_name, dtype in ROUNDED.items():
        with np.errstate(over="ignore", invalid="ignore"):
            predicted = rows[bad].astype(dtype).astype(np.float64)
        yield Candidate(
            share(rows[bad], read[bad], predicted),
            f"kv_rounded_{SHORT[dtype_name]}",
            f"{len(bad)} {name} rows are read as if stored in {dtype_name}",
        )
    norm = float((rows[bad] ** 2).sum())
    factor = float((rows[bad] * read[bad]).sum()) / norm if norm else 0.0
    if factor:
        yield Candidate(
            share(rows[bad], read[bad], factor * rows[bad]) - 1e-9,
            "k_scale_lost" if site is Site.K_CACHE else "v_scale",
            f"{len(bad)} {name} rows are multiplied by {factor:.6g}, as by a scale that is lost or applied twice",
        )


def _lost(lost: Slots, position: int) -> tuple[str, str]:
    if list(lost) == [position]:
        return "key_lost_last", f"decode does not read the row of its own token, slot {position}"
    if list(lost) == list(range(len(lost))):
        return "key_lost_first", f"decode does not read the first {len(lost)} of the rows that prefill attends to"
    return "key_lost_middle", f"decode does not read the slots {lost.tolist()}"


def _whole_rows(
    suspect: Suspect, site: Site, slots: Slots, rows: Floats, read: Floats, bad: Indices
) -> Iterator[Candidate]:
    """Every bad row is a row of another slot, of the other half of the cache, or nothing."""
    name = "K" if site is Site.K_CACHE else "V"
    yield Candidate(
        share(rows[bad], read[bad], np.zeros_like(rows[bad])), "slot_zero", f"the slots {_list(slots[bad])} hold zeros"
    )
    flat = rows.reshape(len(rows), -1)
    nearest = [int(np.argmin(((flat - row.ravel()) ** 2).sum(axis=1))) for row in read[bad]]
    pairs = [(int(slots[b]), int(slots[n])) for b, n in zip(bad, nearest, strict=True)]
    cause, text = (
        "slot_aliased",
        "; ".join(f"slot {slot} holds the {name} of slot {source}" for slot, source in pairs[:4]),
    )
    shifts = {slot - source for slot, source in pairs}
    if len(pairs) > 2 and len(shifts) == 1:
        cause, text = (
            ("slots_shifted" if site is Site.K_CACHE else "v_permuted"),
            f"{len(pairs)} slots hold the {name} of the slot {shifts.pop():+d} before them",
        )
    elif len(pairs) == 2 and pairs[0] == pairs[1][::-1]:
        cause, text = (
            ("slots_swapped" if site is Site.K_CACHE else "v_permuted"),
            f"the slots {pairs[0][0]} and {pairs[0][1]} hold each other's {name}",
        )
    if site is Site.V_CACHE and len(set(nearest)) == len(nearest) > 2:
        cause = "v_permuted"
    yield Candidate(share(rows[bad], read[bad], rows[nearest]) - 1e-6, cause, text)
    yield from _foreign(suspect, site, slots, rows, read, bad)
    other = suspect.prefill.reads.get(
        (Site.V_CACHE if site is Site.K_CACHE else Site.K_CACHE, suspect.address.position)
    )
    if other is not None and other.rows.shape[1:] == rows.shape[1:]:
        found = other.rows[np.searchsorted(other.slots, slots[bad])].astype(np.float64)
        cause = "v_read_as_k" if site is Site.K_CACHE else "k_read_as_v"
        yield Candidate(
            share(rows[bad], read[bad], found), cause, f"{name} rows are taken from the other half of the cache"
        )


def _foreign(
    suspect: Suspect, site: Site, slots: Slots, rows: Floats, read: Floats, bad: Indices
) -> Iterator[Candidate]:
    """The last resort for whole rows: they stand in the place of what prefill wrote and resemble none of it. Its share
    is what replacing just these rows removes, less a little, so that every explanation of their content comes first."""
    untouched = [b for b in range(len(rows)) if b not in set(bad.tolist())]
    whole = (read[bad] != rows[bad]).mean() > 0.9
    own = bool((slots[bad] == suspect.address.position).all())
    if not whole or own:
        return
    from_the_start = len(bad) > 1 and list(bad) == list(range(len(bad)))
    cause = "slot_stale" if len(untouched) > 1 and not from_the_start else "prefix_stale"
    name = "K" if site is Site.K_CACHE else "V"
    yield Candidate(
        0.9991,
        cause,
        f"the slots {_list(slots[bad])} hold {name} rows that prefill wrote nowhere in this layer: stale, or of "
        "another sequence",
    )


def _parts(slots: Slots, rows: Floats, read: Floats, bad: Indices) -> Iterator[Candidate]:
    """Only some heads or elements of the bad rows differ: they are those of another row, or the heads are reordered."""
    heads = rows.shape[1]
    if heads > 1:
        flat = rows[bad].transpose(1, 0, 2).reshape(heads, -1)
        wanted = read[bad].transpose(1, 0, 2).reshape(heads, -1)
        nearest = np.argmin(((wanted[:, None] - flat[None]) ** 2).sum(axis=2), axis=1)
        if not np.array_equal(nearest, np.arange(heads)):
            predicted = rows[bad][:, nearest]
            yield Candidate(
                share(rows[bad], read[bad], predicted),
                "kv_heads_permuted",
                f"kv heads are read in the order {nearest.tolist()}",
            )
    differs = (rows[bad] != read[bad]).any(axis=(0, 1))
    zeroed = rows[bad].copy()
    zeroed[..., np.flatnonzero(differs)] = 0.0
    if 0 < differs.sum() < rows.shape[2]:
        name = f"elements {np.flatnonzero(differs)[0]} to {np.flatnonzero(differs)[-1]} of {len(bad)} rows are zero"
        yield Candidate(share(rows[bad], read[bad], zeroed), "k_tail_dims_lost", name)
        yield Candidate(
            0.9991, "slot_half_stale", f"only part of the rows of the slots {_list(slots[bad])} is what prefill wrote"
        )
    if 0 < differs.sum() < rows.shape[2]:
        elements = np.flatnonzero(differs)
        for source in range(len(rows)):
            predicted = rows[bad].copy()
            predicted[..., elements] = rows[source][None][..., elements]
            yield Candidate(
                share(rows[bad], read[bad], predicted),
                "slot_half_stale",
                f"elements {elements[0]} to {elements[-1]} of the slots {_list(slots[bad])} are those of slot "
                f"{int(slots[source])}",
            )


def _list(slots: Slots) -> str:
    return ", ".join(str(int(slot)) for slot in slots[:6]) + (" ..." if len(slots) > 6 else "")
