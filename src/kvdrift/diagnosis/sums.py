"""Explanations of what is added: a residual stream that is not the sum of its terms, an update of low rank."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from kvdrift.diagnosis.model import GENERAL, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.plain import at_others
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_TERMS = {
    Site.RESID_ATTN: (Site.LAYER_IN, Site.ATTN_OUT),
    Site.LAYER_OUT: (Site.RESID_ATTN, Site.LAYER_IN, Site.MLP_OUT),
}
# Rows that are nearer to each other than this, relatively, are one row.
_DISTINCT = 1e-3
# So many positions and ranks at most are tried: each takes one decomposition for each position.
MOST_POSITIONS = 16


def explain_sums(suspect: Suspect) -> Iterator[Candidate]:
    """Yield which term of a residual sum has another weight, or that what is added has a lower rank than the rows."""
    yield from _terms(suspect)
    if suspect.address.site in Cause.ADAPTER_MISSING.sites:
        yield from _low_rank(suspect)


def _terms(suspect: Suspect) -> Iterator[Candidate]:
    """Decode has one term of the sum with another weight; the weight must do for every position."""
    site, position = suspect.address.site, suspect.address.position
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if right is None or wrong is None or right.shape != wrong.shape:
        return
    for term in _TERMS.get(site, ()):
        found = [
            (p, d, t)
            for at in suspect.positions
            if (p := suspect.prefill.at(site, at)) is not None
            and (d := suspect.decode.at(site, at)) is not None
            and (t := suspect.decode.at(term, at)) is not None
            and p.size == d.size == t.size
        ]
        here = suspect.decode.at(term, position)
        if here is None or here.size != right.size or not float((here**2).sum()) > 0.0:
            continue
        weight = float(((wrong - right).ravel() * here.ravel()).sum()) / float((here**2).sum())
        explained = min(share(p.ravel(), d.ravel(), (p.ravel() + weight * t.ravel())) for p, d, t in found)
        word = "adds" if weight > 0.0 else "leaves out"
        text = f"decode {word} {term} in {site}, {abs(weight):.4g} times, beside what prefill adds up"
        yield Candidate(explained, Cause.RESIDUAL_WRONG, text)


def _low_rank(suspect: Suspect) -> Iterator[Candidate]:
    """What is added at each position lies in the few directions of what is added at the others, as with an adapter.

    Its rank is lower by two at least than there are positions.
    """
    site, position = suspect.address.site, suspect.address.position
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if right is None or wrong is None or right.shape != wrong.shape:
        return
    pairs = [(right.ravel(), wrong.ravel()), *(pair for pair in at_others(suspect) if pair[0].size == right.size)]
    pairs = pairs[:MOST_POSITIONS]
    prefill, decode = (np.stack([pair[i] for pair in pairs]) for i in (0, 1))
    if len(pairs) < 3 or not np.isfinite(prefill).all() or not np.isfinite(decode).all():
        return
    gaps = np.linalg.norm(prefill[1:] - prefill[:1], axis=1)
    if not (gaps > _DISTINCT * np.linalg.norm(prefill[0])).all():
        return
    # Decode less prefill is what is added, whatever rounding leaves beside it.
    added = decode - prefill
    for rank in range(1, len(pairs) - 1):
        explained = _share_of_others(added, rank)
        text = f"decode lacks an update of rank {rank}, or has it twice, as with an adapter that is not applied"
        # The same vector everywhere is of rank one too, and says more.
        yield Candidate(explained - 1e-6 * rank, Cause.ADAPTER_MISSING, text, GENERAL)


def _share_of_others(added: Floats, rank: int) -> float:
    """The share of the squares of rows [position, feature] that lies in the space that the other positions span.

    Any rows are near a space that was fitted to them, and nearer where one of them is larger than the rest. So each is
    held against the first `rank` singular vectors of all others; the share is that of the row of the first position or
    of all, whichever is less.
    """
    kept = np.empty(len(added))
    for row in range(len(added)):
        vectors = np.linalg.svd(np.delete(added, row, axis=0), full_matrices=False)[2][:rank]
        kept[row] = float(((vectors @ added[row]) ** 2).sum())
    sizes = (added**2).sum(axis=1)
    if not sizes[0] > 0.0:
        return 0.0
    return min(float(kept[0] / sizes[0]), float(kept.sum() / sizes.sum()))
