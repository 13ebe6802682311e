"""Explanations of a feed-forward part that is a sum: which expert is left out, or enters with another weight.

A mixture of experts is a weighted sum of the results of its experts, those of the router and those that every token
goes to. Products with the weights of the model are recorded with their results, so that the weights of the sum can be
fitted to each pass. Where both passes are such sums of the same results, their weights say what decode does otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import (
    ENOUGH,
    LEAST_ENOUGH,
    NAMED,
    Candidate,
    Floats,
    Suspect,
    rounding_share,
    share,
)
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

# Unit roundoffs, of the size of the terms, that a sum and a weight may be off by.
_ROUNDINGS = 8.0
# A sum of so many terms for each element would fit anything.
_MOST_TERMS = 0.25
# What rounding leaves over is allowed for so many times.
_ROOM_FOR_ROUNDING = 4.0
# A vector of fewer elements is found in a longer one by chance.
_FEWEST = 8
# Weights below this share of the size of the sum do not count: the result is none of its terms.
_LEAST = 0.02
_EXPERT = re.compile(r"(?:^|\.)experts?\.(\d+)(?:\.|$)|(?:^|\.)experts(?:\.|$)")
_SHARED = re.compile("shared|common|dense|residual_mlp")


@dataclass(frozen=True, slots=True)
class _Sum:
    """The weights of the terms of one pass at one position, by the names of the products that gave them.

    `room` is by how much rounding may move each weight.
    """

    weights: dict[str, float]
    room: dict[str, float]


def explain_by_results(suspect: Suspect) -> Candidate | None:
    """Return what the results of products at the native dtype explain of a difference, None if not enough of it."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None or prefill.shape != decode.shape or not np.isfinite(decode).all():
        return None
    enough = max(LEAST_ENOUGH, ENOUGH - _ROOM_FOR_ROUNDING * rounding_share(suspect.unit, prefill, decode))
    found = (explain_composition(suspect), _handed_on(suspect))
    return next((item for item in found if item is not None and item.explained >= enough), None)


def _handed_on(suspect: Suspect) -> Candidate | None:
    """Decode has the result of a product of the layer, or a run of its elements, where prefill has something made of
    it."""
    site, position = suspect.address.site, suspect.address.position
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None or decode.size < _FEWEST:
        return None
    right, wrong, best = prefill.ravel(), decode.ravel(), None
    for (name, at), row in suspect.decode.products.items():
        if at != position or row.size < wrong.size:
            continue
        for start in range(row.size - wrong.size + 1):
            explained = share(right, wrong, row[start : start + wrong.size])
            if explained > 0.0 and (best is None or best.explained < explained):
                part = "" if row.size == wrong.size else f", the elements {start} to {start + wrong.size - 1}"
                text = (
                    f"decode hands on what {name} gives{part}, unchanged as {site}: the norm, the rotation or whatever "
                    "stands between is left out"
                )
                best = Candidate(explained, Cause.OPERATION_SKIPPED, text, NAMED)
    return best


def explain_composition(suspect: Suspect) -> Candidate | None:
    """Return which term of a feed-forward part has another weight in decode; None where the part is no sum of recorded
    products in both passes, their results differ, or no weight does.

    The share is that of the difference at all positions that other weights of the same terms remove.
    """
    if suspect.address.site is not Site.MLP_OUT:
        return None
    right, wrong, predicted = [], [], []
    sums: list[tuple[_Sum, _Sum]] = []
    for position in (suspect.address.position, *suspect.others):
        found = _at(suspect, position)
        if found is None:
            if position == suspect.address.position:
                return None
            continue
        both, values, fitted = found
        sums.append(both)
        right.append(values[0])
        wrong.append(values[1])
        predicted.append(fitted)
    named = _named(sums)
    if named is None:
        return None
    explained = share(*(np.concatenate(rows) for rows in (right, wrong, predicted)))
    return Candidate(explained, *named, NAMED)


def _at(suspect: Suspect, position: int) -> tuple[tuple[_Sum, _Sum], tuple[Floats, Floats], Floats] | None:
    """The sums of both passes at a position, their values, and decode's with the terms of prefill where it has them."""
    site = suspect.address.site
    values = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if values[0] is None or values[1] is None or values[0].size != values[1].size:
        return None
    terms = [_terms(known.products, position, values[0].size) for known in (suspect.prefill, suspect.decode)]
    flat = values[0].ravel(), values[1].ravel()
    fitted = [_fit(value, known, suspect.unit) for value, known in zip(flat, terms, strict=True)]
    if fitted[0] is None or fitted[1] is None or not _same_results(terms[0], terms[1], suspect.unit):
        return None
    predicted = flat[0].copy()
    for name in terms[0].keys() | terms[1].keys():
        moved = fitted[1].weights.get(name, 0.0) - fitted[0].weights.get(name, 0.0)
        predicted += moved * (terms[0][name] if name in terms[0] else terms[1][name])
    return (fitted[0], fitted[1]), flat, predicted


def _terms(products: dict[tuple[str, int], Floats], position: int, width: int) -> dict[str, Floats]:
    """The results of products at a position that are as wide as the sum."""
    return {
        name: row.ravel()
        for (name, at), row in products.items()
        if at == position and row.size == width and np.isfinite(row).all() and row.any()
    }


def _same_results(prefill: dict[str, Floats], decode: dict[str, Floats], unit: float) -> bool:
    """Whether products that both passes have give the same, up to rounding: else it is they that differ."""
    return all(
        np.linalg.norm(decode[name] - prefill[name]) <= _ROUNDINGS * unit * np.linalg.norm(prefill[name])
        for name in prefill.keys() & decode.keys()
    )


def _fit(value: Floats, terms: dict[str, Floats], unit: float) -> _Sum | None:
    """The weights of a sum, by least squares; None if it is not one of these terms, up to rounding."""
    if not 1 < len(terms) <= _MOST_TERMS * value.size or not np.isfinite(value).all():
        return None
    columns = np.stack(list(terms.values()), axis=1)
    weights, _, rank, _ = np.linalg.lstsq(columns, value, rcond=None)
    if rank < len(terms):
        return None
    size = float(np.sqrt(((columns * weights) ** 2).sum()))
    left = float(np.linalg.norm(value - columns @ weights))
    if not left <= _ROUNDINGS * unit * size:
        return None
    # By how much a weight moves where the value moves by rounding: through the inverse of the columns.
    spread = np.sqrt(np.diag(np.linalg.inv(columns.T @ columns))) * unit * size
    return _Sum(
        dict(zip(terms, weights.tolist(), strict=True)),
        {
            name: _ROUNDINGS * (float(of) + unit * abs(float(weight)))
            for name, of, weight in zip(terms, spread, weights, strict=True)
        },
    )


def _named(sums: Sequence[tuple[_Sum, _Sum]]) -> tuple[Cause, str] | None:
    """The cause that the weights of prefill and decode show, at all positions together."""
    names = list(dict.fromkeys(name for both in sums for known in both for name in known.weights))
    if not any(_EXPERT.search(name) and not _SHARED.search(name) for name in names):
        return None
    moved = [name for name in names if any(_moves(name, *both) for both in sums)]
    beside = [name for name in moved if _SHARED.search(name) or not _EXPERT.search(name)]
    if not moved:
        return None
    if len(beside) == len(moved) == 1:
        return _of_shared(beside[0], sums)
    if beside:
        return None
    return _of_routed(moved, sums)


def _moves(name: str, prefill: _Sum, decode: _Sum) -> bool:
    before, after = prefill.weights.get(name, 0.0), decode.weights.get(name, 0.0)
    return abs(after - before) > prefill.room.get(name, 0.0) + decode.room.get(name, 0.0)


def _span(name: str, sums: Sequence[_Sum]) -> str:
    weights = [known.weights.get(name, 0.0) for known in sums]
    low, high = min(weights), max(weights)
    return f"{low:.3g}" if f"{low:.3g}" == f"{high:.3g}" else f"{low:.3g} to {high:.3g}"


def _is_none(name: str, known: _Sum) -> bool:
    """Whether a term does not enter a sum."""
    return abs(known.weights.get(name, 0.0)) <= max(known.room.get(name, 0.0), _LEAST)


def _of_shared(name: str, sums: Sequence[tuple[_Sum, _Sum]]) -> tuple[Cause, str]:
    prefill, decode = [both[0] for both in sums], [both[1] for both in sums]
    for side, other, known in (("decode", "prefill", (decode, prefill)), ("prefill", "decode", (prefill, decode))):
        if all(_is_none(name, each) for each in known[0]) and not any(_is_none(name, each) for each in known[1]):
            text = f"{side} leaves out what {name} gives, which {other} adds {_span(name, known[1])} times"
            return Cause.SHARED_EXPERT_MISSING, text
    text = (
        f"decode adds {_span(name, decode)} times what {name} gives and prefill {_span(name, prefill)} times; the "
        "experts of the router are alike"
    )
    return Cause.SHARED_EXPERT_WEIGHT, text


def _of_routed(moved: Sequence[str], sums: Sequence[tuple[_Sum, _Sum]]) -> tuple[Cause, str]:
    for prefill, decode in sums:
        lost = [name for name in moved if _is_none(name, decode) and not _is_none(name, prefill)]
        more = [name for name in moved if _is_none(name, prefill) and not _is_none(name, decode)]
        if lost and not more:
            return Cause.EXPERT_MISSING, f"decode leaves out what {_listed(lost)} gives, which prefill adds"
        if lost and more:
            return Cause.EXPERT_WEIGHTS, f"decode takes {_listed(more)} where prefill takes {_listed(lost)}"
    ratios = [
        decode.weights[name] / prefill.weights[name]
        for prefill, decode in sums
        for name in moved
        if prefill.weights.get(name) and name in decode.weights
    ]
    text = (
        f"decode adds what {_listed(moved)} give {min(ratios):.3g} to {max(ratios):.3g} times as much as prefill: "
        "weights that are not normalised, or a factor that is lost"
        if ratios
        else "the experts have other weights in decode"
    )
    return Cause.EXPERT_WEIGHTS, text


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


__all__ = ["explain_by_results", "explain_composition"]
