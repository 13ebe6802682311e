"""Explanations of a value of which a part is wrong: heads or a tile that is zero or scaled, logits of some tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.extent import Stretch, part_of, tell_part
from kvdrift.diagnosis.model import EXACT, NAMED, Bools, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.values import ComparedRows, rows_of
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.shapes import Extent
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, Site

# A factor that was fitted to fewer values says nothing.
_FEWEST = 4
# Of so few elements of a row a single one may be all there is to explain.
_FEWEST_IN_ROW = 4
# What a penalty changes is not most of the vocabulary.
_SOME = 0.25


def explain_parts(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what may have happened to the heads or elements that differ, where the others are right."""
    site = suspect.address.site
    rows = None if site in ATTENTION_ROW_SITES else rows_of(suspect)
    if rows is None or not np.isfinite(rows.prefill).all() or not np.isfinite(rows.decode).all():
        return
    differs = rows.differs(rows.room(suspect.unit))
    bad = rows.bad(differs, is_cache=site in CACHE_SITES)
    if not len(bad):
        return
    union = np.asarray(differs[bad].any(axis=0))
    part = part_of(union)
    if part.extent not in (Extent.ALL, Extent.SCATTERED):
        slots = tuple(rows.labels[i] for i in bad) if site in CACHE_SITES and len(bad) < len(rows.labels) else ()
        yield from _scaled(site, rows, part, union, bad, slots)
    if site is Site.LOGITS and int(union.sum()) <= _SOME * union.size:
        yield from _processed(rows, union, bad)


def _scaled(
    site: Site, rows: ComparedRows, part: Stretch, union: Bools, bad: list[int], slots: tuple[int, ...]
) -> Iterator[Candidate]:
    """The part is zero, or is off by one factor at every position or slot."""
    prefill, decode = rows.prefill[bad], rows.decode[bad]
    right, wrong = prefill[:, part.mask], decode[:, part.mask]
    where = tell_part(part, int(union.sum()), union.shape, "element").removeprefix("in ")
    by_heads = part.extent is Extent.HEADS
    if not wrong.any():
        # The last dims of a key that are zero have a name of their own.
        if by_heads or site not in CACHE_SITES:
            cause = Cause.HEADS_ZERO if by_heads else Cause.TILE_ZERO
            yield Candidate(1.0, cause, f"decode has zeros in {where}", EXACT, slots)
        return
    size = float((right**2).sum())
    if size == 0.0 or right.size < _FEWEST or right.shape[1] < _FEWEST_IN_ROW:
        return
    factor = float((right * wrong).sum()) / size
    predicted = prefill.copy()
    predicted[:, part.mask] *= factor
    explained = min(share(p[None], d[None], w[None]) for p, d, w in zip(prefill, decode, predicted, strict=True))
    text = f"decode multiplies {where} by {factor:.6g}, and nothing else"
    yield Candidate(explained, Cause.HEADS_SCALED if by_heads else Cause.BLOCK_SCALED, text, NAMED, slots)


def _processed(rows: ComparedRows, union: Bools, bad: list[int]) -> Iterator[Candidate]:
    """The logits of some tokens are divided where they are positive and multiplied where they are not, as a penalty on
    repetition does (Keskar et al. 2019, section 4.1), or are moved by one number, as biases and penalties on presence
    do."""
    right, wrong = rows.prefill[bad][:, union], rows.decode[bad][:, union]
    n_tokens = right.shape[1]
    moved = wrong != right
    if not moved.any():
        return
    shift = float((wrong - right)[moved].mean())
    text = f"the logits of {n_tokens} tokens are moved by {shift:.6g}"
    predicted = np.where(moved, right + shift, right)
    yield Candidate(_of(right, wrong, predicted), Cause.LOGITS_PROCESSED, text, NAMED if right.size > 1 else EXACT)
    signed = np.where(right > 0.0, right, -1.0 / np.where(right == 0.0, 1.0, right))
    other = np.where(right > 0.0, wrong, -1.0 / np.where(wrong == 0.0, 1.0, wrong))
    # wrong = right / p where positive, right * p elsewhere: both say that `other` is `signed` / p.
    ratio = (other / signed)[moved & (right != 0.0)]
    if ratio.size < 2 or not (ratio > 0.0).all():
        return
    penalty = float(np.exp(-np.log(ratio).mean()))
    predicted = np.where(moved, np.where(right > 0.0, right / penalty, right * penalty), right)
    text = f"the logits of {n_tokens} tokens have a penalty of {penalty:.6g} on them"
    yield Candidate(_of(right, wrong, predicted), Cause.LOGITS_PROCESSED, text)


def _of(right: Floats, wrong: Floats, predicted: Floats) -> float:
    return share(right, wrong, predicted)
