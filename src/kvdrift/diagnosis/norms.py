"""Explanations of a wrong norm: its epsilon, its weight, the dtype of its root.

A norm computes y = w x / sqrt(m + e), with m the mean square of x (of x less its mean, for a layer norm), e its epsilon
and w its weight. None of e and w is in a trace; x and prefill's y are.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, NAMED, Candidate, Floats, Suspect, share
from kvdrift.diagnosis.plain import ROUNDED, at_others
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.sites import Site

_SOURCE = {
    Site.ATTN_NORM_OUT: (Site.LAYER_IN,),
    Site.FFN_NORM_OUT: (Site.RESID_ATTN,),
    Site.FINAL_NORM_OUT: (Site.LAYER_OUT,),
}
_WITH_WEIGHT = (*_SOURCE, Site.Q_NORM, Site.K_NORM)
# What a norm may be given instead, as wide as the residual stream.
_STREAM = (Site.LAYER_IN, Site.ATTN_NORM_OUT, Site.ATTN_OUT, Site.RESID_ATTN)
# Values of prefill that are smaller than this share of their row say nothing about a factor of theirs.
_TELLING = 1e-3
# What the norms of queries and keys are given.
_PROJECTED = {Site.Q_NORM: (Site.Q_PROJ,), Site.K_NORM: (Site.K_PROJ,)}
# Rows to which a weight and a bias of each element are fitted, and the share of the difference that prefill itself may
# be off by then.
_FEWEST_ROWS, _FOLLOWS = 3, 1e-3
_LESS = 1e-6  # by which more that is fitted must explain more
# A factor of each element is another weight where a single one leaves so many times more.
_FEWER_LEFT = 4.0
# A factor is a known one where it is off by less than this share of what it is off from one.
_SAME = 0.02
# A part of fewer elements is none.
_FEWEST_OF_A_PART = 4
# Epsilons that models use. One that is lowered cannot fall by more than the largest of them.
_EPSILONS = (1e-5, 1e-6, 1e-8, 1e-12)
_MOST_LOST = 1.05e-5
_LARGEST_ROUNDING = 2.0**-6


@dataclass(frozen=True, slots=True)
class _NormRow:
    """What one position shows: the centred input, the mean square of it, and both results."""

    x: Floats
    mean_square: float
    prefill: Floats
    decode: Floats

    @property
    def factor(self) -> float:
        """By what decode's result is multiplied, of prefill's, by least squares."""
        return float(self.decode @ self.prefill) / float(self.prefill @ self.prefill)


def explain_norm(suspect: Suspect) -> Iterator[Candidate]:
    """Yield what may be wrong with the norm whose result is the first failing site."""
    for centred in (False, True):
        rows = _rows(suspect, centred)
        if rows:
            yield from _epsilon(rows)
            yield from _root(rows)
            yield from _weight(rows)
            yield from _another_input(suspect, rows, centred)
        if centred and len(rows) > 1:
            yield from _before_bias(rows)
    yield from _centring(suspect)
    yield from _over_parts(suspect)
    yield from _over_some(suspect)
    yield from _one_factor_before_bias(suspect)
    yield from _another_weight(suspect)
    yield from _another_weight_and_bias(suspect)


def _rows(suspect: Suspect, centred: bool) -> list[_NormRow]:
    site = suspect.address.site
    rows = []
    for position in (suspect.address.position, *suspect.others):
        for source in _SOURCE.get(site, ()):
            # In layer isolation the norm of decode is given prefill's own input.
            x, p, d = (
                suspect.prefill.at(source, position),
                suspect.prefill.at(site, position),
                suspect.decode.at(site, position),
            )
            if x is None or p is None or d is None or not x.size == p.size == d.size:
                continue
            x, p, d = x.ravel(), p.ravel(), d.ravel()
            if centred:
                x = x - x.mean()
            mean_square = float(np.mean(x**2))
            finite = np.isfinite(x).all() and np.isfinite(p).all() and np.isfinite(d).all()
            if finite and mean_square > 0.0 and float(p @ p) > 0.0 and not np.array_equal(p, d):
                rows.append(_NormRow(x, mean_square, p, d))
    return rows


def _pooled(rows: list[_NormRow], predicted: list[Floats]) -> float:
    """The share over all positions together: one parameter must do for all of them."""
    return share(
        np.concatenate([row.prefill for row in rows]),
        np.concatenate([row.decode for row in rows]),
        np.concatenate(predicted),
    )


def _epsilon(rows: list[_NormRow]) -> Iterator[Candidate]:
    """A factor f at mean square m means that the epsilon moved by (m + e) (1 / f^2 - 1), about m (1 / f^2 - 1): by the
    same amount at every position. Positions of small m say most about it."""
    shifts = np.array([row.mean_square * (1.0 / row.factor**2 - 1.0) for row in rows if row.factor != 0.0])
    if len(shifts) < len(rows):
        return
    weights = np.array([float(row.prefill @ row.prefill) / row.mean_square**2 for row in rows])
    shift = float(np.average(shifts, weights=weights))
    if shift < -_MOST_LOST or 1.0 + shift / min(row.mean_square for row in rows) <= 0.0:
        return
    predicted = [row.prefill / np.sqrt(1.0 + shift / row.mean_square) for row in rows]
    word = "larger" if shift > 0.0 else "smaller"
    text = f"the norm of decode has an epsilon that is {word} by {abs(shift):.3g}"
    yield Candidate(_pooled(rows, predicted), Cause.NORM_EPSILON, text)


def _root(rows: list[_NormRow]) -> Iterator[Candidate]:
    """The factor of the whole row, 1 / sqrt(m + e), is rounded to a narrower dtype."""
    for name in ("bfloat16", "float16"):
        for epsilon in _EPSILONS:
            roots = [1.0 / np.sqrt(row.mean_square + epsilon) for row in rows]
            rounded = [float(np.float64(root).astype(ROUNDED[name]).astype(np.float64)) for root in roots]
            predicted = [row.prefill * (b / a) for row, a, b in zip(rows, roots, rounded, strict=True)]
            text = f"the norm of decode rounds its inverse root to {name}"
            yield Candidate(_pooled(rows, predicted), Cause.NORM_DTYPE, text, EXACT)
    if all(0.0 < abs(row.factor - 1.0) < _LARGEST_ROUNDING for row in rows):
        text = (
            f"the norm of decode is off by a factor that changes with the row ({rows[0].factor:.9g} here), like a "
            "rounded root"
        )
        yield Candidate(_pooled(rows, [row.factor * row.prefill for row in rows]), Cause.NORM_DTYPE, text, GENERAL)


def _before_bias(rows: list[_NormRow]) -> Iterator[Candidate]:
    """The epsilon or the rounded root of a layer norm with a bias, which the factor of the row does not multiply.

    With the factors `1 + g` [row] known, the bias `b` [feature] of `y' - y = g (y - b)` follows by least squares. Of an
    epsilon that moved by `s`, `g` is `-s / (2 m)` to first order: what any bias makes is along `1 / m`, and across it
    `s` is all that is unknown.
    """
    if len({row.x.size for row in rows}) > 1:
        return
    mean_squares = np.array([row.mean_square for row in rows])
    prefill, decode = (np.stack([getattr(row, side) for row in rows]) for side in ("prefill", "decode"))

    def with_factors(factors: Floats) -> Floats:
        off = (factors - 1.0)[:, None]
        size = float((off**2).sum())
        bias = (off * (off * prefill - (decode - prefill))).sum(axis=0) / size if size > 0.0 else 0.0 * prefill[0]
        return np.asarray(prefill + off * (prefill - bias))

    for epsilon in (0.0, *_EPSILONS):  # that of prefill
        found = _shift_before_bias(mean_squares + epsilon, prefill, decode, with_factors)
        if found is not None:
            shift, explained = found
            word = "larger" if shift > 0.0 else "smaller"
            text = f"the norm of decode has an epsilon that is {word} by {abs(shift):.3g}"
            yield Candidate(explained - _LESS, Cause.NORM_EPSILON, text)
    for name, epsilon in itertools.product(("bfloat16", "float16"), _EPSILONS):
        roots = 1.0 / np.sqrt(mean_squares + epsilon)
        rounded = roots.astype(ROUNDED[name]).astype(np.float64)
        text = f"the norm of decode rounds its inverse root to {name}"
        yield Candidate(share(prefill, decode, with_factors(rounded / roots)) - _LESS, Cause.NORM_DTYPE, text, EXACT)


def _shift_before_bias(
    means: Floats, prefill: Floats, decode: Floats, with_factors: Callable[[Floats], Floats]
) -> tuple[float, float] | None:
    """By how much an epsilon moved where a bias follows, and the share that this explains; None if it cannot have.

    `means` [row] are mean squares with prefill's epsilon. The first order is looked around for the best.
    """
    along = 0.5 / means
    across = np.eye(len(means)) - np.outer(along, along) / float(along @ along)
    response, drift = across @ (along[:, None] * prefill), across @ (decode - prefill)
    size = float((response**2).sum())
    shift = -float((response * drift).sum()) / size if size > 0.0 else 0.0
    best, width = (shift, -np.inf), 1.0
    for _ in range(3):
        for tried in best[0] * (1.0 + width * np.linspace(-0.5, 1.0, 31)):
            if tried and tried >= -_MOST_LOST and 1.0 + tried / float(means.min()) > 0.0:
                explained = share(prefill, decode, with_factors(1.0 / np.sqrt(1.0 + tried / means)))
                best = max(best, (float(tried), explained), key=lambda found: found[1])
        width /= 15.0
    return best if best[1] >= LEAST_ENOUGH else None


def _weight(rows: list[_NormRow]) -> Iterator[Candidate]:
    """The weight is one more or one less, as where it is stored as an offset from one: y moves by x / sqrt(m + e)."""
    bases = [row.x / np.sqrt(row.mean_square) for row in rows]
    norm = sum(float(base @ base) for base in bases)
    # The epsilon is not known: where m is small it makes the step a little less than one.
    step = sum(float((row.decode - row.prefill) @ base) for row, base in zip(rows, bases, strict=True)) / norm
    if abs(abs(step) - 1.0) < 0.02:
        predicted = [row.prefill + step * base for row, base in zip(rows, bases, strict=True)]
        word = "added to" if step > 0.0 else "taken from"
        text = f"one is {word} the weight of decode's norm, as if it were stored the other way"
        yield Candidate(_pooled(rows, predicted), Cause.NORM_WEIGHT_OFFSET, text, NAMED)


def _another_input(suspect: Suspect, rows: list[_NormRow], centred: bool) -> Iterator[Candidate]:
    """The norm is given another tensor of the layer. Its weight is read off prefill: w = y sqrt(m) / x."""
    site = suspect.address.site
    own = rows[0]
    telling = np.abs(own.x) > _TELLING * np.sqrt(own.mean_square)
    weight = np.divide(own.prefill * np.sqrt(own.mean_square), own.x, out=np.zeros_like(own.x), where=telling)
    bias: Floats | float = 0.0
    if centred and len(rows) >= _FEWEST_ROWS and (fitted := _weight_and_bias(rows)) is not None:
        (weight, bias), telling = fitted, np.ones_like(telling)
    position = suspect.address.position
    given: dict[str, Floats | None] = {source: suspect.decode.at(source, position) for source in _STREAM}
    stream, added = given[Site.LAYER_IN], given[Site.ATTN_OUT]
    if site is Site.ATTN_NORM_OUT and stream is not None and added is not None and stream.size == added.size:
        # Where attention and the feed-forward part share one norm, their sum is what a layer without that would norm.
        given[f"{Site.LAYER_IN} + {Site.ATTN_OUT}"] = stream.ravel() + added.ravel()
    for source, x in given.items():
        if source in _SOURCE.get(site, ()) or x is None or x.size != own.x.size:
            continue
        x = x.ravel() - (x.mean() if centred else 0.0)
        size = float(np.mean(x**2))
        if not np.isfinite(size) or size == 0.0:
            continue
        predicted = weight * x / np.sqrt(size) + bias
        text = f"the norm of decode is given {source} in the place of {_SOURCE[site][0]}"
        explained = share(own.prefill[telling], own.decode[telling], predicted[telling])
        yield Candidate(explained, Cause.NORM_INPUT_WRONG, text)
    again = own.prefill - (own.prefill.mean() if centred else 0.0)
    size = float(np.mean(again**2))
    if site in _SOURCE and size > 0.0:
        predicted = weight * again / np.sqrt(size) + bias
        explained = share(own.prefill[telling], own.decode[telling], predicted[telling])
        yield Candidate(explained, Cause.NORM_INPUT_WRONG, "decode applies its norm twice")


def _weight_and_bias(rows: list[_NormRow]) -> tuple[Floats, Floats] | None:
    """The weight and the bias of each element that prefill shows over several positions, None if it does not follow
    from any."""
    given = np.stack([row.x / np.sqrt(row.mean_square) for row in rows])
    prefill, decode = (np.stack([getattr(row, side) for row in rows]) for side in ("prefill", "decode"))
    centre, target = given.mean(axis=0), prefill.mean(axis=0)
    spread = ((given - centre) ** 2).sum(axis=0)
    if not spread.all():
        return None
    weight = ((given - centre) * (prefill - target)).sum(axis=0) / spread
    bias = target - weight * centre
    left = float(((prefill - weight * given - bias) ** 2).sum())
    return (weight, bias) if left <= _FOLLOWS * float(((decode - prefill) ** 2).sum()) else None


def _centring(suspect: Suspect) -> Iterator[Candidate]:
    """One pass subtracts the mean of a row and the other does not. Weight and bias of each element are fitted to
    prefill, at several positions, and prefill must follow from them."""
    plain, centred = _rows(suspect, False), _rows(suspect, True)
    if len(plain) < _FEWEST_ROWS or len(plain) != len(centred):
        return
    forms = [np.stack([row.x / np.sqrt(row.mean_square) for row in rows]) for rows in (plain, centred)]
    prefill, decode = (np.stack([getattr(row, side) for row in plain]) for side in ("prefill", "decode"))
    for before, after, word in ((forms[1], forms[0], "does not subtract"), (forms[0], forms[1], "subtracts")):
        mean = before.mean(axis=0)
        spread = ((before - mean) ** 2).sum(axis=0)
        if not spread.all():
            continue
        weight = ((before - mean) * (prefill - prefill.mean(axis=0))).sum(axis=0) / spread
        bias = prefill.mean(axis=0) - weight * mean
        left = float(((prefill - weight * before - bias) ** 2).sum())
        if left <= _FOLLOWS * float(((decode - prefill) ** 2).sum()):
            text = f"the norm of decode {word} the mean of its row"
            yield Candidate(share(prefill, decode, weight * after + bias), Cause.NORM_CENTRED, text, NAMED)


def _over_parts(suspect: Suspect) -> Iterator[Candidate]:
    """The mean square is taken over equal parts of the row, or over the whole row where each head has its own."""
    site, position = suspect.address.site, suspect.address.position
    sources = _PROJECTED.get(site, _SOURCE.get(site, ()))
    x = next((v for source in sources if (v := suspect.prefill.at(source, position)) is not None), None)
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if x is None or right is None or wrong is None or not x.size == right.size == wrong.size:
        return
    x, right, wrong = x.ravel(), right.ravel(), wrong.ravel()
    for count in (2, 4, 8, 16, 32):
        if x.size % count or x.size // count < _FEWEST_OF_A_PART:
            continue
        own = np.sqrt((x.reshape(count, -1) ** 2).mean(axis=1, keepdims=True))
        whole = float(np.sqrt((x**2).mean()))
        if not own.all() or not np.isfinite(own).all():
            continue
        for factor, text in (
            (whole / own, f"the norm of decode takes its mean square over each of {count} parts of the row"),
            (own / whole, f"the norm of decode takes its mean square over all {count} heads, and not over each"),
        ):
            predicted = (right.reshape(count, -1) * factor).ravel()
            yield Candidate(share(right, wrong, predicted), Cause.NORM_OVER_PARTS, text, EXACT)


def _over_some(suspect: Suspect) -> Iterator[Candidate]:
    """The mean square is taken over the first or the last elements alone, or their sum is divided by n - 1."""
    rows = _rows(suspect, False)
    if not rows or not all(np.array_equal(row.x.shape, rows[0].x.shape) for row in rows):
        return
    size = rows[0].x.size
    best = (-np.inf, 0, "first")
    squared, along = (
        np.array([[float(row.prefill @ getattr(row, side))] for row in rows]) for side in ("prefill", "decode")
    )
    for word, step in (("first", 1), ("last", -1)):
        # Mean squares [row, count] of so many elements from one end, over those of the whole row.
        sums = np.cumsum(np.stack([row.x[::step] ** 2 for row in rows]), axis=1)
        if not sums[:, _FEWEST_OF_A_PART - 1 :].all():
            continue
        means = sums / np.arange(1, size + 1)
        factors = np.sqrt(means[:, -1:] / means[:, _FEWEST_OF_A_PART - 1 : -1])
        # What each number of elements leaves, less what decode is by itself.
        count = int((factors**2 * squared - 2.0 * factors * along).sum(axis=0).argmin())
        predicted = [row.prefill * factor for row, factor in zip(rows, factors[:, count], strict=True)]
        best = max(best, (_pooled(rows, predicted), count + _FEWEST_OF_A_PART, word))
    if best[0] >= LEAST_ENOUGH and len(rows) >= _FEWEST_ROWS:
        text = f"the norm of decode takes its mean square over the {best[2]} {best[1]} of {size} elements"
        yield Candidate(best[0], Cause.NORM_OVER_PARTS, text, NAMED)


def _one_factor_before_bias(suspect: Suspect) -> Iterator[Candidate]:
    """What the norm makes has one factor for all elements and rows, and its bias has none: each element is off by an
    offset of its own beside. Of a variance over n - 1 elements the factor is known."""
    site = suspect.address.site
    right, wrong = (values.at(site, suspect.address.position) for values in (suspect.prefill, suspect.decode))
    if site not in _SOURCE or right is None or wrong is None or right.size != wrong.size:
        return
    pairs = [(right.ravel(), wrong.ravel()), *((p, d) for p, d in at_others(suspect) if p.size == right.size)]
    prefill, decode = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    centre, target = prefill.mean(axis=0), decode.mean(axis=0)
    spread = float(((prefill - centre) ** 2).sum())
    if len(pairs) < _FEWEST_ROWS or not np.isfinite(spread) or spread == 0.0:
        return
    factor = float(((prefill - centre) * (decode - target)).sum()) / spread
    text = f"the norm of decode has a factor of {factor:.7g} before its bias"
    is_known = abs(factor - np.sqrt(1.0 - 1.0 / right.size)) < _SAME * abs(1.0 - factor)
    predicted = factor * (prefill - centre) + target
    if is_known:
        text += ", as where its variance is the sum of squares over n - 1 and not n"
    cause = Cause.NORM_OVER_PARTS if is_known else Cause.SCALED
    # An offset of each element is fitted: what has none comes first.
    if (explained := share(prefill, decode, predicted) - _LESS) >= LEAST_ENOUGH:
        yield Candidate(explained, cause, text, NAMED if is_known else GENERAL)


def _another_weight(suspect: Suspect) -> Iterator[Candidate]:
    """Every element is off by a factor of its own, the same at every position: the weight is another one.

    The factors come from the first failing position, and are tested on the others.
    """
    site, position = suspect.address.site, suspect.address.position
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if site not in _WITH_WEIGHT or right is None or wrong is None or right.size != wrong.size:
        return
    others = [(p, d) for p, d in at_others(suspect) if p.size == right.size]
    right, wrong = right.ravel(), wrong.ravel()
    if (
        not others
        or not right.any()
        or not all(np.isfinite(v).all() for pair in (*others, (right, wrong)) for v in pair)
    ):
        return
    telling = np.abs(right) > _TELLING * np.sqrt(np.mean(right**2))
    factors = np.divide(wrong, right, out=np.ones_like(right), where=telling)
    held = [share(p[telling], d[telling], (factors * p)[telling]) for p, d in others]
    one = float(wrong @ right) / float(right @ right)
    if 1.0 - min(share(p, d, one * p) for p, d in others) <= _FEWER_LEFT * max(1.0 - min(held), _LESS):
        return  # one factor does for all elements
    text = "decode multiplies each element by a factor of its own, the same at every position: by another weight"
    yield Candidate(min(held), Cause.NORM_WEIGHT_WRONG, text, GENERAL)


def _another_weight_and_bias(suspect: Suspect) -> Iterator[Candidate]:
    """Every element has a factor and an offset of its own, the same at every position. Each position is held against
    what the others give."""
    site, position = suspect.address.site, suspect.address.position
    right, wrong = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if site not in _SOURCE or right is None or wrong is None or right.size != wrong.size:
        return
    pairs = [(right.ravel(), wrong.ravel()), *((p, d) for p, d in at_others(suspect) if p.size == right.size)]
    prefill, decode = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    if len(pairs) <= _FEWEST_ROWS or not np.isfinite(prefill).all() or not np.isfinite(decode).all():
        return
    predicted = np.empty_like(decode)
    for row in range(len(pairs)):
        before, after = np.delete(prefill, row, axis=0), np.delete(decode, row, axis=0)
        centre, target = before.mean(axis=0), after.mean(axis=0)
        spread = ((before - centre) ** 2).sum(axis=0)
        factor = np.divide(
            ((before - centre) * (after - target)).sum(axis=0), spread, out=np.zeros_like(spread), where=spread > 0.0
        )
        predicted[row] = target + factor * (prefill[row] - centre)
    centred = [side - side.mean(axis=0) for side in (prefill, decode)]
    one = float((centred[0] * centred[1]).sum()) / max(float((centred[0] ** 2).sum()), np.finfo(float).tiny)
    left = [1.0 - share(prefill, decode, of) for of in (one * centred[0] + decode.mean(axis=0), predicted)]
    if left[0] <= _FEWER_LEFT * max(left[1], _LESS):
        return  # one factor does for all elements
    text = (
        "decode gives each element a factor and an offset of its own, the same at every position: another weight and "
        "another bias"
    )
    yield Candidate(share(prefill, decode, predicted) - _LESS, Cause.NORM_WEIGHT_WRONG, text, GENERAL)
