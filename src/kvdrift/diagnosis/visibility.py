"""Explanations of which keys decode attends to: some that it should not, or not all that it should."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, NAMED, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import both_rows, capped, operands_of
from kvdrift.replay.attention import attend
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# The share from which on zeros are what is mostly read.
_MOSTLY = 0.9


@dataclass(frozen=True, slots=True)
class _Seen:
    """Keys at one position: the first that prefill sees, those that decode loses and those that it gains."""

    position: int
    first: int
    lost: list[int]
    gained: list[int]

    @property
    def n_left(self) -> int:
        """How many of prefill's keys decode still sees."""
        return self.position + 1 - self.first - len(self.lost)


def explain_visibility(suspect: Suspect) -> Iterator[Candidate]:
    """Yield how the keys that decode attends to differ from those of prefill."""
    later = _later_keys(suspect)
    if later:
        text = f"prefill attends to the keys {later} of tokens that come later, which no decode step can have"
        yield Candidate(1.0, Cause.NOT_CAUSAL, text, EXACT)
        return
    seen = _seen(suspect, suspect.address.position)
    if seen is not None and seen.lost and not seen.gained:
        yield from _lost(suspect, seen)
    elif seen is not None and seen.gained and not seen.lost:
        text = f"decode attends to the keys {seen.gained}, which prefill does not see"
        left = _has_window(suspect, seen) and max(seen.gained) < seen.first
        off_by_one = Cause.WINDOW_OFF_BY_ONE if len(seen.gained) == 1 else Cause.WINDOW_TOO_LONG
        yield Candidate(1.0, off_by_one if left else Cause.MASK_LEAK, text, EXACT)
    yield from _behind(suspect)
    yield from _unrecorded(suspect)


def _has_window(suspect: Suspect, seen: _Seen) -> bool:
    """Whether prefill attends to a window that moves with the position: the layer says so, or the first key that it
    sees moves by one from each position to the next. That of a text behind padding stays."""
    if seen.first == 0:
        return False
    if suspect.spec is not None and suspect.spec.window is not None:
        return True
    others = [found for at in suspect.others if (found := _seen(suspect, at)) is not None]
    return bool(others) and all(found.first - seen.first == found.position - seen.position for found in others)


def _behind(suspect: Suspect) -> Iterator[Candidate]:
    """Decode attends to slots behind its own key, which prefill does not: of zeros, if nothing was written there."""
    place = Site.ATTN_SCORES, suspect.address.position
    scores, slots = suspect.decode.at(*place), suspect.decode.slots.get(place)
    if scores is None or slots is None:
        return
    seen = scores[:, (slots > suspect.address.position) & ~np.isneginf(scores).all(axis=0)]
    if not seen.size:
        return
    n_slots = seen.shape[1]
    if not seen.any():
        text = f"decode attends to {n_slots} slots behind its own key that hold zeros, as ones that were never written"
        yield Candidate(1.0, Cause.UNWRITTEN_SLOTS_READ, text, EXACT)
    elif suspect.fed_alone:
        text = f"decode attends to {n_slots} slots behind its own key, which hold what was left there"
        yield Candidate(1.0, Cause.UNWRITTEN_SLOTS_READ, text, EXACT)
    else:
        text = f"decode attends to {n_slots} slots behind its own key, which hold what is not its own"
        yield Candidate(1.0, Cause.MASK_LEAK, text, EXACT)


def _later_keys(suspect: Suspect) -> list[int]:
    """The keys behind its own position that prefill lets take part."""
    place = Site.ATTN_SCORES, suspect.address.position
    scores, slots = suspect.prefill.at(*place), suspect.prefill.slots.get(place)
    if scores is None or slots is None:
        return []
    visible = ~np.isneginf(scores).all(axis=0)
    return [int(slot) for slot in slots[visible & (slots > suspect.address.position)]]


def _seen(suspect: Suspect, position: int) -> _Seen | None:
    rows = both_rows(suspect, Site.ATTN_SCORES, position)
    if rows is None:
        return None
    prefill, decode = (~np.isneginf(row).all(axis=0) for row in rows)
    if not prefill.any():
        return None
    first = int(np.flatnonzero(prefill)[0])
    lost, gained = np.flatnonzero(prefill & ~decode).tolist(), np.flatnonzero(decode & ~prefill).tolist()
    return _Seen(position, first, _cut_out(rows, lost, first, position), gained)


def _cut_out(rows: tuple[Floats, Floats], lost: list[int], first: int, position: int) -> list[int]:
    """Keys that are cut out move those after them down, so that the last ones seem to be missing: which of prefill's
    columns decode has, in their order, tells where they were."""
    n_lost = len(lost)
    if not n_lost or lost != list(range(position + 1 - n_lost, position + 1)):
        return lost
    kept: list[int] = []
    for column in range(first, position + 1 - n_lost):
        key = kept[-1] + 1 if kept else first
        while key <= position and not np.allclose(rows[0][:, key], rows[1][:, column], rtol=1e-6, atol=1e-9):
            key += 1
        if key > position:
            return lost
        kept.append(key)
    return sorted(set(range(first, position + 1)) - set(kept))


def _lost(suspect: Suspect, seen: _Seen) -> Iterator[Candidate]:
    window = None if suspect.spec is None else suspect.spec.window
    n_lost = len(seen.lost)
    if seen.lost == list(range(seen.first, seen.first + n_lost)):
        text = f"decode does not attend to the first {n_lost} of the keys that prefill attends to"
        if _has_window(suspect, seen):
            cause = Cause.WINDOW_OFF_BY_ONE if n_lost == 1 else Cause.WINDOW_TOO_SHORT
            yield Candidate(1.0, cause, f"{text}: its window is shorter by {n_lost}", EXACT)
        elif window is None and seen.n_left in suspect.windows:
            text = f"decode attends to the last {seen.n_left} keys only, the window of other layers of this model"
            yield Candidate(1.0, Cause.WINDOW_WRONG_LAYER, text, EXACT)
        yield Candidate(1.0, Cause.KEY_LOST_FIRST, text)
        return
    if seen.lost[-1] == seen.position and n_lost == seen.lost[-1] - seen.lost[0] + 1:
        frozen = _frozen(suspect, seen)
        if frozen:
            text = (
                f"decode attends to the first {seen.position + 1 - n_lost} keys at every step, however many there are"
            )
            yield Candidate(1.0, Cause.KV_LEN_FROZEN, text, EXACT)
        if n_lost == 1:
            yield Candidate(1.0, Cause.KEY_LOST_LAST, f"decode does not attend to its own token, key {seen.position}")
            return
        cause = Cause.MASK_TOP_LEFT if seen.lost[0] == seen.first + 1 else Cause.KEY_TILE_LOST
        text = f"decode does not attend to the last {n_lost} keys, {seen.lost[0]} to {seen.position}"
        yield Candidate(1.0, cause, text)
        return
    yield Candidate(1.0, Cause.KEY_LOST_MIDDLE, f"decode does not attend to the keys {seen.lost}")


def _frozen(suspect: Suspect, seen: _Seen) -> bool:
    """Whether the last key that decode sees is the same at two positions at least, and the keys after it are lost."""
    last = seen.lost[0] - 1
    if seen.lost[0] == seen.first + 1:
        return False  # one key alone is what a mask of the wrong corner leaves as well
    others = [found for p in suspect.others if p > last and (found := _seen(suspect, p)) is not None]
    return bool(others) and all(found.lost == list(range(last + 1, found.position + 1)) for found in others)


def _unrecorded(suspect: Suspect) -> Iterator[Candidate]:
    """Scores agree, and the probabilities of a head are all smaller by one factor: a key that is not among the cached
    ones takes the rest. Its weight says which: a slot of zeros has the score 0, an old row that of its key."""
    rows, scores = both_rows(suspect, Site.ATTN_PROBS), both_rows(suspect, Site.ATTN_SCORES)
    operands = operands_of(suspect, suspect.prefill)
    if suspect.address.site is not Site.ATTN_PROBS or rows is None or scores is None or operands is None:
        return
    prefill, decode = rows
    if not (prefill.shape == decode.shape and prefill.sum(axis=1).all()):
        return
    left = decode.sum(axis=1) / prefill.sum(axis=1)
    if not ((left > 0.0) & (left < 1.0)).all():
        return
    spec, clean = operands.attention, attend(operands)
    visible = clean.probs > 0.0
    top = np.where(visible, capped(clean.raw, spec.softcap), -np.inf).max(axis=1)
    # Sum of exp(score - top) over everything that takes part, sinks included.
    total = 1.0 / clean.probs.max(axis=1)
    n_slots = float(np.median((1.0 / left - 1.0) * total / np.exp(-top)))
    if n_slots > 0.5:
        count = round(n_slots)
        text = f"decode attends to {count} slots behind its own key that hold zeros, as ones that were never written"
        weight = count * np.exp(-top)
        predicted = prefill * (total / (total + weight))[:, None]
        yield Candidate(share(prefill, decode, predicted), Cause.UNWRITTEN_SLOTS_READ, text, NAMED)
        zeros = share(prefill, decode, predicted)
        if spec.sinks is None:
            # After a rewind some of these slots hold rows, so that zeros alone do not explain all of it.
            # With one query no token stands behind it: what is read there is what nobody wrote, or a rewind left.
            unwritten = zeros > _MOSTLY or suspect.fed_alone
            cause = Cause.UNWRITTEN_SLOTS_READ if unwritten else Cause.MASK_LEAK
            where = "slots behind its own key" if unwritten else "slots with none of its tokens, such as padding"
            text = f"decode attends to {where}" + (", most of them zeros" if zeros > _MOSTLY else "")
            yield Candidate(share(prefill, decode, left[:, None] * prefill), cause, text, GENERAL)
    if spec.window is None:
        return
    raw = capped(clean.raw, spec.softcap)
    for index in np.flatnonzero(operands.slots <= operands.position - spec.window):
        predicted = prefill * (total / (total + np.exp(raw[:, index] - top)))[:, None]
        text = f"decode also attends to slot {int(operands.slots[index])}, which has left the window"
        yield Candidate(share(prefill, decode, predicted), Cause.WINDOW_OFF_BY_ONE, text, EXACT)
