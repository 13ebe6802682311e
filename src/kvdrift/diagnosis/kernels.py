"""Explanations of what a decode kernel does with right operands: rows of another slot, another query, slots of padding
in the sum of weights, parts that are merged with other weights, scores that are clamped."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, NAMED, Bools, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.operands import capped
from kvdrift.diagnosis.splits import MOST_ENDS, cuts_of
from kvdrift.replay.attention import Attended, Operands, rows_per_head
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# A value that is read for another one is tried for every pair of so many keys at most.
_MOST_KEYS = 64
# What is fitted to the context fits a part of anything; only where it leaves next to nothing does it say something.
_NEARLY_ALL = 0.9


def explain_read_scores(suspect: Suspect, rows: tuple[Floats, Floats], visible: Bools) -> Iterator[Candidate]:
    """Yield what may have been read for scores: the keys of other slots, or a limit that they stay below."""
    prefill, decode = rows
    seen = np.flatnonzero(visible.all(axis=0))
    if len(seen) < 2:
        return
    right, wrong = prefill[:, seen], decode[:, seen]
    gaps = ((wrong[:, :, None] - right[:, None, :]) ** 2).sum(axis=0)
    nearest = np.where(gaps.diagonal() <= gaps.min(axis=1), np.arange(len(seen)), gaps.argmin(axis=1))
    moved = np.flatnonzero(nearest != np.arange(len(seen)))
    if 0 < len(moved) <= len(seen) // 2:
        predicted = prefill.copy()
        predicted[:, seen] = right[:, nearest]
        of, read = (seen[index].tolist()[:4] for index in (moved, nearest[moved]))
        text = f"decode reads, for the keys of the slots {of}, those of the slots {read}"
        yield Candidate(_share(prefill, decode, predicted, visible), Cause.SLOT_ALIASED, text, EXACT)
    limit = float(wrong.max())
    if int((wrong == limit).sum()) > 1 or float(right.max()) > limit:
        text = f"decode clamps its scores at {limit:.6g}"
        yield Candidate(_share(prefill, decode, np.minimum(prefill, limit), visible), Cause.SOFTCAP_WRONG, text, NAMED)


def explain_other_query(
    suspect: Suspect, operands: Operands, rows: tuple[Floats, Floats], visible: Bools
) -> Iterator[Candidate]:
    """Yield the scores of the query of another position, as of a step before whose operands a graph still holds."""
    keys = rows_per_head(operands.keys, operands)
    inside = operands.slots < rows[0].shape[1]
    for position in suspect.others:
        query = suspect.prefill.at(Site.Q_ROPE, position)
        if query is None or query.size != operands.query.size:
            continue
        raw = operands.attention.scale * np.einsum("hd,hsd->hs", query.reshape(operands.query.shape), keys)
        predicted = rows[0].copy()
        predicted[:, operands.slots[inside]] = capped(raw, operands.attention.softcap)[:, inside]
        text = f"decode attends with the query of position {position}"
        yield Candidate(_share(*rows, predicted, visible), Cause.VALUE_OF_OTHER_POSITION, text, EXACT)


def explain_read_values(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Yield which one value is read for another, how many slots of zeros enter the sum of weights, and with which
    weights of each head two parts are merged."""
    yield from _value_for_another(operands, clean, wrong)
    yield from _padding_in_the_sum(operands, clean, wrong)
    yield from _merged_with_other_weights(operands, clean, wrong)


def _value_for_another(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    values, n_keys = rows_per_head(operands.values, operands), clean.probs.shape[1]
    if not 1 < n_keys <= _MOST_KEYS:
        return
    error = wrong - clean.context
    best = (0.0, 0, 0)
    for of in range(n_keys):
        moved = clean.probs[:, of, None, None] * (values - values[:, of : of + 1])
        left = ((error[:, None] - moved) ** 2).sum(axis=(0, 2))
        read = int(left.argmin())
        explained = 1.0 - float(left[read]) / max(float((error**2).sum()), np.finfo(float).tiny)
        best = max(best, (explained, of, read))
    explained, of, read = best
    if explained > _NEARLY_ALL:
        text = f"decode reads, for the value of slot {operands.slots[of]}, that of slot {operands.slots[read]}"
        yield Candidate(explained, Cause.SLOT_ALIASED, text, EXACT)


def _padding_in_the_sum(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """Slots of zeros have the score 0, and weigh exp(-m) beside the largest score m of a head."""
    size = (clean.context**2).sum(axis=1)
    if operands.attention.sinks is not None or not size.all() or not clean.probs.max(axis=1).all():
        return
    factor = (wrong * clean.context).sum(axis=1) / size
    scores = np.where(clean.probs > 0.0, capped(clean.raw, operands.attention.softcap), -np.inf)
    top, total = scores.max(axis=1), 1.0 / clean.probs.max(axis=1)
    if not ((factor > 0.0) & (factor < 1.0)).any():
        return
    with np.errstate(divide="ignore", over="ignore"):
        n_slots = round(float(np.clip(np.median((1.0 / np.abs(factor) - 1.0) * total * np.exp(top)), 0.0, 1e6)))
    if n_slots:
        predicted = clean.context * (total / (total + n_slots * np.exp(-top)))[:, None]
        explained = share(clean.context, wrong, predicted)
        if explained > _NEARLY_ALL:
            text = f"decode counts {n_slots} slots of zeros behind its own key in the sum of weights"
            yield Candidate(explained, Cause.UNWRITTEN_SLOTS_READ, text, EXACT)


def _merged_with_other_weights(operands: Operands, clean: Attended, wrong: Floats) -> Iterator[Candidate]:
    """The results of the first keys and of the later ones, each times a factor of its head."""
    values = rows_per_head(operands.values, operands)
    if values.shape[2] < 4:
        return  # two factors would fit anything
    best = (-np.inf, 0)
    for cut in cuts_of(clean.probs.shape[1], MOST_ENDS)[1:-1]:
        parts = [np.einsum("hs,hsd->hd", clean.probs[:, at], values[:, at]) for at in (slice(cut), slice(cut, None))]
        first, second, mixed = ((a * b).sum(axis=1) for a, b in ((parts[0],) * 2, (parts[1],) * 2, parts))
        along = [(part * wrong).sum(axis=1) for part in parts]
        det = first * second - mixed**2
        if not (det > 1e-12 * first * second).all():
            continue
        factors = (second * along[0] - mixed * along[1]) / det, (first * along[1] - mixed * along[0]) / det
        predicted = factors[0][:, None] * parts[0] + factors[1][:, None] * parts[1]
        best = max(best, (share(clean.context, wrong, predicted), cut))
    if best[1] and best[0] > _NEARLY_ALL:
        text = f"the results of the first {best[1]} keys and of the later ones are merged with other weights"
        if best[1] in (1, clean.probs.shape[1] - 1):
            text += " (or the score of the one key apart is another, as of a row that is stored or rotated wrongly)"
        yield Candidate(best[0], Cause.CHUNK_MERGE, text, GENERAL)


def _share(prefill: Floats, decode: Floats, predicted: Floats, visible: Bools) -> float:
    return share(prefill[visible], decode[visible], predicted[visible])
