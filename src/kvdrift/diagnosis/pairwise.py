"""How pairs of elements lie in a head and are turned, and explanations of pairs that are mapped by no rotation: signs,
an update in place, other elements than prefill turns."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.model import EXACT, GENERAL, LEAST_ENOUGH, Candidate, Floats, share
from kvdrift.replay.turns import Complex, angle_of, pairs_of
from kvdrift.vocabulary.causes import Cause

# Two rows of two numbers are fitted to each pair: so many heads say more than that.
_FEWEST_HEADS = 3
# A matrix is named where a rotation leaves so many times more, beside what any fit leaves.
_MORE_LEFT, _ALIKE = 4.0, 1e-6


@dataclass(frozen=True, slots=True)
class TurnedHeads:
    """One position: pairs [head, pair] before rotation, after it in prefill and in decode, and the elements that this
    layout leaves alone (prefill's and decode's)."""

    position: int
    before: Complex
    right: Complex
    wrong: Complex
    rest: tuple[Floats, Floats]

    @property
    def angle(self) -> Floats:
        """By which prefill turns each pair."""
        return angle_of(self.before, self.right)

    @property
    def turned(self) -> Complex:
        """Decode's rotation of each pair, times its size."""
        return np.asarray(np.sum(self.wrong * self.before.conj(), axis=0))


@dataclass(frozen=True, slots=True)
class Layout:
    """How pairs lie in a head, and what prefill shows of the rotation: `step` [pair] is the angle of one position,
    `factor` what all are multiplied by. `turns` are the positions at which decode differs, first failure first."""

    dim: int
    halves: bool
    rotated: int
    factor: float
    step: Floats
    turns: tuple[TurnedHeads, ...]

    def explained(self, predict: Callable[[TurnedHeads], Complex]) -> float:
        """The share that a prediction of decode's pairs removes, over all positions together."""
        prefill, decode, predicted = [], [], []
        for turn in self.turns:
            prefill += [turn.right.real, turn.right.imag, turn.rest[0]]
            decode += [turn.wrong.real, turn.wrong.imag, turn.rest[1]]
            found = predict(turn)
            predicted += [found.real, found.imag, turn.rest[0]]
        flat = [np.concatenate([part.ravel() for part in parts]) for parts in (prefill, decode, predicted)]
        return share(*flat)


# By cosine c and sine s, the matrix [[a, b], [d, e]] that takes (x, y) to (a x + b y, d x + e y); right is c, -s, s, c.
_Matrix = tuple[Floats, Floats, Floats, Floats]
_FORMS: tuple[tuple[str, Callable[[Floats, Floats], _Matrix]], ...] = (
    (
        "the second element of each is made of the first that is turned already, as in place",
        lambda c, s: (c, -s, s * c, c - s * s),
    ),
    (
        "the first element of each is made of the second that is turned already, as in place",
        lambda c, s: (c - s * s, -s * c, s, c),
    ),
    ("the sine is added in both elements", lambda c, s: (c, s, s, c)),
    ("the sine is subtracted in both elements", lambda c, s: (c, -s, -s, c)),
    ("the sines are left out", lambda c, s: (c, 0.0 * s, 0.0 * s, c)),
    ("the second element of each is left as it is", lambda c, s: (c, -s, 0.0 * s, 0.0 * s + 1.0)),
    ("the first element of each is left as it is", lambda c, s: (0.0 * s + 1.0, 0.0 * s, s, c)),
    ("cosines and sines are exchanged", lambda c, s: (s, -c, c, s)),
)


def explain_pairs(layout: Layout, what: str) -> Iterator[Candidate]:
    """Yield by which matrix that is no rotation decode may map each pair: a known form, or one that all heads share.

    Args:
        layout: how pairs lie, and the positions at which decode differs.
        what: "query" or "key", for the text.
    """
    for words, form in _FORMS:

        def mapped(turn: TurnedHeads, form: Callable[[Floats, Floats], _Matrix] = form) -> Complex:
            return _apply(form(np.cos(turn.angle), np.sin(turn.angle)), layout.factor * turn.before)

        text = f"decode does not rotate the pairs of its {what}: {words}"
        explained = layout.explained(mapped)
        if explained >= LEAST_ENOUGH:
            yield Candidate(explained, Cause.ROPE_NO_ROTATION, text, EXACT)
    if any(len(turn.before) < _FEWEST_HEADS for turn in layout.turns):
        return
    explained, turned = layout.explained(_fitted), layout.explained(_turned)
    # A rotation by other angles, with a factor or without, is such a matrix too.
    if explained >= LEAST_ENOUGH and 1.0 - turned > _MORE_LEFT * max(1.0 - explained, _ALIKE):
        text = f"decode maps each pair of its {what} by a matrix that all heads share and that is no rotation"
        yield Candidate(explained, Cause.ROPE_NO_ROTATION, text, GENERAL)


def _apply(matrix: _Matrix, pairs: Complex) -> Complex:
    a, b, d, e = matrix
    return np.asarray(a * pairs.real + b * pairs.imag + 1j * (d * pairs.real + e * pairs.imag))


def _turned(turn: TurnedHeads) -> Complex:
    """Pairs turned and scaled by the number of each pair that comes nearest to decode over all heads."""
    size = np.maximum((np.abs(turn.before) ** 2).sum(axis=0), np.finfo(float).tiny)
    return np.asarray(turn.before * (turn.turned / size)[None])


def _fitted(turn: TurnedHeads) -> Complex:
    """Pairs under the matrix of each pair that comes nearest to decode over all heads."""
    given = np.stack([turn.before.real, turn.before.imag], axis=-1).transpose(1, 0, 2)  # [pair, head, 2]
    wanted = np.stack([turn.wrong.real, turn.wrong.imag], axis=-1).transpose(1, 0, 2)
    found = given @ (np.linalg.pinv(given) @ wanted)
    return np.asarray((found[..., 0] + 1j * found[..., 1]).T)


def explain_other_elements(layout: Layout, what: str) -> Iterator[Candidate]:
    """Yield which other elements of each head decode may turn by the right angles, where prefill turns the first ones
    alone."""
    n_left = layout.dim - layout.rotated
    if not n_left:
        return
    size, halves = layout.rotated, layout.halves
    for first in range(1, n_left + 1):
        prefill, decode, predicted = [], [], []
        for turn in layout.turns:
            plain = _heads(turn.before, turn.rest[0], halves)
            turned = layout.factor * pairs_of(plain[:, first : first + size].ravel(), size, halves)
            found = plain.copy()
            found[:, first : first + size] = _flat(turned * np.exp(1j * turn.angle)[None], halves)
            prefill.append(_heads(turn.right, turn.rest[0], halves))
            decode.append(_heads(turn.wrong, turn.rest[1], halves))
            predicted.append(found)
        text = (
            f"decode rotates the elements {first} to {first + size - 1} of each head of its {what}, and prefill the "
            f"first {size}"
        )
        explained = share(*(np.concatenate(side) for side in (prefill, decode, predicted)))
        if explained >= LEAST_ENOUGH:
            yield Candidate(explained, Cause.ROPE_PARTIAL_DIMS, text, EXACT)


def _heads(pairs: Complex, rest: Floats, halves: bool) -> Floats:
    """Whole heads [head, dim] of their pairs, which come first, and of the elements that stay."""
    return np.concatenate([_flat(pairs, halves), rest], axis=1)


def _flat(pairs: Complex, halves: bool) -> Floats:
    """The elements [head, 2 * pair] of pairs [head, pair]."""
    if halves:
        return np.concatenate([pairs.real, pairs.imag], axis=1)
    return np.stack([pairs.real, pairs.imag], axis=-1).reshape(len(pairs), -1)
