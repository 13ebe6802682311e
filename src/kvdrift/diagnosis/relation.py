"""What the part that differs has to do with prefill: a factor, an offset, another order, one direction.

Every relation predicts decode from prefill, and is scored by the share of the squared difference that it removes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import Bools, Floats, Indices, removed
from kvdrift.vocabulary.shapes import Relation

# The share that a relation must remove to be told, less four times what rounding may contribute, but never less than
# the second figure.
_ENOUGH, _ENOUGH_IN_NOISE = 0.99, 0.8
_ROOM_FOR_ROUNDING = 4.0
# Relations that differ by less than this explain a difference equally well.
_ALIKE = 1e-4
# Fewer values for each factor that is fitted say nothing.
_FEWEST = 4
# Rows that are nearer to each other than this, relatively, are one row.
_DISTINCT = 1e-3
# An order of elements is believed where values seldom agree by chance: in single precision and above, or over rows.
_FINE = 2.0**-20
_MOST_ELEMENTS = 1 << 16


@dataclass(frozen=True, slots=True, order=True)
class Related:
    """One relation: the share that it removes, how little was fitted (more is less), and what it says."""

    explained: float
    rank: int
    relation: Relation
    size: float | None
    text: str


@dataclass(frozen=True, slots=True)
class Sides:
    """Both passes where they differ, [row, head, element], and what belongs to the part that differs.

    `room` [row] is how far rounding may move an element; `row_word` says what a row is, a position or a slot.
    """

    prefill: Floats
    decode: Floats
    mask: Bools
    room: Floats
    unit: float
    row_word: str

    @property
    def inside(self) -> tuple[Floats, Floats]:
        """The part that differs, [row, value]."""
        return self.prefill[:, self.mask], self.decode[:, self.mask]


def relation_of(sides: Sides, noise: float) -> Related:
    """Return the relation that removes most of the difference; Relation.NONE if none removes enough.

    Of those that remove as much, up to rounding, the one is told with the least to fit. `noise` is the share of the
    squared difference that rounding may make.
    """
    if not np.isfinite(sides.prefill).all() or not np.isfinite(sides.decode).all():
        return _nonfinite(sides)
    found = sorted(_relations(sides), key=lambda item: item.explained, reverse=True)
    enough = max(_ENOUGH_IN_NOISE, _ENOUGH - _ROOM_FOR_ROUNDING * noise)
    if not found or found[0].explained < enough:
        near = f" (the nearest, {found[0].text}, explains {found[0].explained:.0%})" if found else ""
        if not found or found[0].explained < 0.5:
            near = ""
        return Related(0.0, 0, Relation.NONE, None, f"no simple relation to prefill's values{near}")
    alike = [item for item in found if item.explained >= found[0].explained - max(_ALIKE, noise)]
    return max(alike, key=lambda item: (item.rank, item.explained))


def _nonfinite(sides: Sides) -> Related:
    prefill, decode = sides.inside
    sick = "decode" if not np.isfinite(decode).all() else "prefill"
    if not np.isfinite(prefill).all() and not np.isfinite(decode).all():
        return Related(1.0, 3, Relation.NONFINITE, None, "both passes have NaN or infinity")
    return Related(1.0, 3, Relation.NONFINITE, None, f"{sick} has NaN or infinity")


def _relations(sides: Sides) -> Iterator[Related]:
    prefill, decode = sides.inside
    if not decode.any():
        yield Related(1.0, 4, Relation.ZEROS, None, "decode has zeros")
        return
    yield Related(
        removed(prefill, decode, -prefill), 4, Relation.SIGN_FLIPPED, None, "decode has the values of the other sign"
    )
    yield from _factors(sides, prefill, decode)
    yield from _added(sides, prefill, decode)
    yield from _heads_moved(sides)
    yield from _rows_moved(sides)
    yield from _elements_moved(sides)


def _fit(given: Floats, wanted: Floats, axis: int | None = None) -> Floats:
    """The factor that is nearest, by least squares, over all values or for each row."""
    size = np.sum(given**2, axis=axis, keepdims=axis is not None)
    product = np.sum(given * wanted, axis=axis, keepdims=axis is not None)
    return np.asarray(np.divide(product, size, out=np.ones_like(size), where=size > 0.0))


def _factors(sides: Sides, prefill: Floats, decode: Floats) -> Iterator[Related]:
    if prefill.size < 2:
        return  # a factor fits every single value
    one = float(_fit(prefill, decode))
    text = f"decode has {one:.6g} times prefill's values"
    yield Related(removed(prefill, decode, one * prefill), 3, Relation.FACTOR, one, text)
    if len(prefill) > 1 and prefill.shape[1] >= _FEWEST:
        each = _fit(prefill, decode, axis=1)
        text = (
            f"decode has prefill's values times a factor that changes with the {sides.row_word}, {each.min():.4g} to "
            f"{each.max():.4g}"
        )
        yield Related(removed(prefill, decode, each * prefill), 1, Relation.FACTOR_BY_ROW, None, text)
    heads = np.flatnonzero(sides.mask.any(axis=1))
    if len(heads) > 1 and int(sides.mask.sum()) >= _FEWEST * len(heads):
        kept = sides.mask[None]
        right, wrong = np.where(kept, sides.prefill, 0.0), np.where(kept, sides.decode, 0.0)
        size = np.sum(right**2, axis=(0, 2), keepdims=True)
        product = np.sum(right * wrong, axis=(0, 2), keepdims=True)
        each = np.divide(product, size, out=np.ones_like(size), where=size > 0.0)
        values = ", ".join(f"{value:.4g}" for value in each.ravel()[heads][:8])
        text = f"decode has prefill's values times a factor of each head: {values}"
        yield Related(removed(right, wrong, each * right), 2, Relation.FACTOR_BY_HEAD, None, text)


def _added(sides: Sides, prefill: Floats, decode: Floats) -> Iterator[Related]:
    change = decode - prefill
    if change.size > 1:
        mean = float(change.mean())
        text = f"decode has {abs(mean):.6g} {'more' if mean > 0 else 'less'} in every element"
        yield Related(removed(prefill, decode, prefill + mean), 3, Relation.OFFSET, mean, text)
    if change.shape[1] < _FEWEST:
        return
    if not _are_distinct(prefill):
        return  # where all inputs are the same, so is every error
    vector = change.mean(axis=0, keepdims=True)
    text = f"the same vector is added at every {sides.row_word}"
    yield Related(removed(prefill, decode, prefill + vector), 2, Relation.SAME_VECTOR, None, text)
    left, sizes, right = np.linalg.svd(change, full_matrices=False)
    text = f"what is added is a multiple of one vector at every {sides.row_word}: an error of rank one"
    predicted = prefill + sizes[0] * left[:, :1] * right[:1]
    yield Related(removed(prefill, decode, predicted), 0, Relation.ONE_DIRECTION, None, text)


def _are_distinct(rows: Floats) -> bool:
    """Whether there are two rows or more, and no two of them are the same."""
    if len(rows) < 2:
        return False
    gaps = np.linalg.norm(rows[1:] - rows[:1], axis=1)
    return bool((gaps > _DISTINCT * np.linalg.norm(rows[0])).all())


def _heads_moved(sides: Sides) -> Iterator[Related]:
    """Heads are in another order, or one of them stands in several places."""
    n_heads = sides.prefill.shape[1]
    if n_heads < 2 or sides.prefill.shape[2] < _FEWEST:
        return
    right, wrong = (v.transpose(1, 0, 2).reshape(n_heads, -1) for v in (sides.prefill, sides.decode))
    nearest = _nearest(wrong, right)
    if np.array_equal(nearest, np.arange(n_heads)):
        return
    moved = [f"head {h} has that of head {int(s)}" for h, s in enumerate(nearest) if s != h]
    text = "; ".join(moved[:4]) + (f"; {len(moved) - 4} more heads are moved" if len(moved) > 4 else "")
    yield Related(removed(right, wrong, right[nearest]), 3, Relation.HEADS_PERMUTED, None, text)


def _rows_moved(sides: Sides) -> Iterator[Related]:
    """Rows are those of other positions or slots."""
    prefill, decode = sides.inside
    if len(prefill) < 2 or prefill.shape[1] < _FEWEST:
        return
    nearest = _nearest(decode, prefill)
    if np.array_equal(nearest, np.arange(len(prefill))):
        return
    text = f"each {sides.row_word} that differs has the values of another one"
    yield Related(removed(prefill, decode, prefill[nearest]), 2, Relation.ROWS_PERMUTED, None, text)


def _nearest(wanted: Floats, known: Floats) -> Indices:
    distance = np.stack([((wanted - row) ** 2).sum(axis=1) for row in known], axis=1)
    return np.asarray(np.argmin(distance, axis=1), dtype=np.intp)


def _elements_moved(sides: Sides) -> Iterator[Related]:
    """Each element has the value of another one of its row, the same in every row."""
    right, wrong = (v.reshape(len(v), -1) for v in (sides.prefill, sides.decode))
    total = right.shape[1]
    if total < _FEWEST or total > _MOST_ELEMENTS or (len(right) < 2 and sides.unit > _FINE):
        return
    order = np.argsort(right[0], kind="stable")
    place = np.searchsorted(right[0][order], wrong[0]).clip(1, total - 1)
    before, after = order[place - 1], order[place]
    off = [np.abs(right[:, source] - wrong).max(axis=0) for source in (before, after)]
    source = np.where(off[0] <= off[1], before, after)
    if (np.minimum(*off) > sides.room.max()).any() or len(set(source.tolist())) < total:
        return
    text = "decode has the same elements in another order" + _order_in_words(source, sides.prefill.shape[1:])
    yield Related(removed(right, wrong, right[:, source]), 3, Relation.ELEMENTS_PERMUTED, None, text)


def _order_in_words(source: Indices, shape: tuple[int, ...]) -> str:
    total = len(source)
    moved = np.flatnonzero(source != np.arange(total))
    steps = set(((moved - source[moved]) % total).tolist())
    if len(steps) == 1:
        step = steps.pop()
        step = step - total if step > total // 2 else step
        return f": moved by {step:+d}"
    if np.array_equal(source[moved], moved[::-1]):
        return ": backwards"
    plain = np.arange(total)
    orders = [
        ("heads and elements exchanged", plain.reshape(shape).T.ravel()),
        ("heads and elements exchanged", plain.reshape(shape[::-1]).T.ravel()),
    ]
    if total % 2 == 0:
        orders.append(("neighbours taken apart into halves", plain.reshape(-1, 2).T.ravel()))
        orders.append(("halves put together as neighbours", plain.reshape(2, -1).T.ravel()))
    return next((f": {word}" for word, wanted in orders if np.array_equal(source, wanted)), "")
