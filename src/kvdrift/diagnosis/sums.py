"""Explanations of what is added: a residual stream that is not the sum of its terms, an update of low rank."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.plain import at_others
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_TERMS = {
    Site.RESID_ATTN: (Site.LAYER_IN, Site.ATTN_OUT),
    Site.LAYER_OUT: (Site.RESID_ATTN, Site.LAYER_IN, Site.MLP_OUT),
}
# A residual stream and what is added to it.
_ADDED = {
    Site.RESID_ATTN: ((Site.LAYER_IN, Site.ATTN_OUT),),
    Site.LAYER_OUT: ((Site.RESID_ATTN, Site.MLP_OUT),),
}
# Values of a layer as wide as its stream.
_STREAM = (
    Site.LAYER_IN,
    Site.ATTN_NORM_OUT,
    Site.ATTN_OUT,
    Site.RESID_ATTN,
    Site.FFN_NORM_OUT,
    Site.MLP_OUT,
)
# Elements that are smaller than this share of their row say nothing about a weight of theirs.
_TELLING = 0.05
# The share of the squares of what is added that a weight of each element may leave over: rounding of two values of 16
# bits, where the second cancels in the first.
_FOLLOWS = 1e-2
_LESS = 1e-6
# Two weights say something where they hold at so many positions.
_FEWEST_POSITIONS = 2
# Rows that are nearer to each other than this, relatively, are one row.
_DISTINCT = 1e-3
# An update of low rank moves more than this share of the elements, each by more than this share of the one that moves
# most.
_MOST_OF, _BESIDE = 0.5, 1e-6
# So many positions and ranks at most are tried: each takes one decomposition for each position.
MOST_POSITIONS = 16


def explain_sums(suspect: Suspect) -> Iterator[Candidate]:
    """Yield which term of a residual sum has another weight, or that what is added has a lower rank than the rows."""
    yield from _terms(suspect)
    yield from _plain_sum(suspect)
    yield from _exchanged(suspect)
    yield from _other_weights(suspect)
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


def _plain_sum(suspect: Suspect) -> Iterator[Candidate]:
    """Decode adds up two recorded terms as they are, where prefill does something to one of them: a norm behind
    attention or behind the feed-forward part, or a factor of each element."""
    site = suspect.address.site
    for stream, added in _ADDED.get(site, ()):
        rows = [
            tuple(v.ravel() for v in (p, d, s, a))
            for at in (suspect.address.position, *suspect.others)
            if (p := suspect.prefill.at(site, at)) is not None
            and (d := suspect.decode.at(site, at)) is not None
            and (s := suspect.decode.at(stream, at)) is not None
            and (a := suspect.decode.at(added, at)) is not None
            and p.size == d.size == s.size == a.size
        ]
        if len(rows) >= _FEWEST_POSITIONS and _is_normed([(p - s, a) for p, _, s, a in rows]):
            factor = _one_factor([(p - s, a) for p, _, s, a in rows])
            what = "norm" if factor is None else f"factor {factor:.6g}"
            text = f"decode adds {added} to {stream} as it is: the {what} that stands between in prefill is left out"
            yield Candidate(min(share(p, d, s + a) for p, d, s, a in rows), Cause.OPERATION_SKIPPED, text, EXACT)


def _one_factor(pairs: list[tuple[Floats, Floats]]) -> float | None:
    """The one factor of what is added, the first of each pair, over the second, at all positions; None: there is no
    such factor."""
    added, term = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    factor = float(added @ term) / float(term @ term)
    left = added - factor * term
    return factor if float(left @ left) <= _FOLLOWS**2 * float(added @ added) else None


def _other_weights(suspect: Suspect) -> Iterator[Candidate]:
    """What is added to the stream has a factor of each element, the same at every position: the norm that stands
    between has another weight. The factors are those of the first position, and are tested on the others."""
    site = suspect.address.site
    for stream, _ in _ADDED.get(site, ()):
        rows = [
            ((p - s).ravel(), (d - s).ravel())
            for at in (suspect.address.position, *suspect.others)
            if (p := suspect.prefill.at(site, at)) is not None
            and (d := suspect.decode.at(site, at)) is not None
            and (s := suspect.decode.at(stream, at)) is not None
            and p.shape == d.shape == s.shape
        ]
        if len(rows) < _FEWEST_POSITIONS or not all(np.isfinite(v).all() for row in rows for v in row):
            continue
        right, wrong = rows[0]
        telling = np.abs(right) > _TELLING * np.sqrt(np.mean(right**2))
        factors = np.divide(wrong, right, out=np.zeros_like(right), where=telling)
        explained = min(share(p[telling], d[telling], (factors * p)[telling]) for p, d in rows[1:])
        text = f"what decode adds to {stream} has a factor of each element, the same at every position: another weight"
        yield Candidate(explained, Cause.NORM_WEIGHT_WRONG, text, GENERAL)


def _is_normed(pairs: list[tuple[Floats, Floats]]) -> bool:
    """Whether what is added, the first of each pair, is the second times a weight of each element and a factor of each
    position, as a norm makes it. The weights are those of the first position.

    A pass that adds up its terms as they are breaks no rule, so that without this any other sum would be explained. So
    would a sum that is a little off, if weights of nearly one counted: they must account for what the term itself does
    not.
    """
    added, term = pairs[0]
    if not all(np.isfinite(v).all() for pair in pairs for v in pair):
        return False
    telling = np.abs(term) > _TELLING * np.sqrt(np.mean(term**2))
    weights = np.divide(added, term, out=np.zeros_like(added), where=telling)
    for other, given in pairs[1:]:
        wanted, found = other[telling], (weights * given)[telling]
        size = float(found @ found)
        if not size > 0.0:
            return False
        left = wanted - float(wanted @ found) / size * found
        apart = wanted - given[telling]
        if float(left @ left) > _FOLLOWS * min(float(wanted @ wanted), float(apart @ apart)):
            return False
    return True


def _exchanged(suspect: Suspect) -> Iterator[Candidate]:
    """Decode adds another value of the layer in the place of a term, or a second one beside it: two values of the layer
    have weights that prefill does not give them, the same at every position."""
    site = suspect.address.site
    if site not in _TERMS or len(suspect.positions) < _FEWEST_POSITIONS:
        return
    right, wrong = (
        [values.at(site, at) for at in (suspect.address.position, *suspect.others)]
        for values in (suspect.prefill, suspect.decode)
    )
    known = {}
    for term in _STREAM:
        rows = [suspect.decode.at(term, at) for at in (suspect.address.position, *suspect.others)]
        if all(
            t is not None and p is not None and d is not None and t.size == p.size == d.size and np.isfinite(t).all()
            for t, p, d in zip(rows, right, wrong, strict=True)
        ):
            known[term] = np.concatenate([np.ravel(t) for t in rows if t is not None])
    if len(known) < 2:
        return
    before, after = (np.concatenate([np.ravel(v) for v in side if v is not None]) for side in (right, wrong))
    if not np.isfinite(before).all() or not np.isfinite(after).all():
        return
    for first, second in combinations(known, 2):
        columns = np.stack([known[first], known[second]], axis=1)
        weights = np.linalg.lstsq(columns, after - before, rcond=None)[0]
        words = " and ".join(
            f"{weight:+.4g} times {term}" for weight, term in zip(weights, (first, second), strict=True)
        )
        text = f"decode adds {words} to {site}, beside what prefill adds up"
        # What says it with one value, or without a weight, comes first.
        explained = share(before, after, before + columns @ weights) - _LESS
        yield Candidate(explained, Cause.RESIDUAL_WRONG, text, GENERAL)


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
    if int((np.abs(added).max(axis=0) > _BESIDE * np.abs(added).max()).sum()) <= _MOST_OF * added.shape[1]:
        return  # an adapter moves all elements; few of them have few directions whatever moved them
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
