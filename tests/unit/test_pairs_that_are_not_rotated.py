"""Queries whose pairs decode maps by no rotation, or whose other elements it turns, are told from other rotations."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.diagnosis.diagnose import diagnose
from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
# Maps the elements x, y [head, pair] of pairs by their angles [pair].
Map = Callable[[Floats, Floats, Floats, Floats], tuple[Floats, Floats]]
POSITIONS = (11, 12, 13, 14)
HEADS, DIM = 4, 16


def _right(x: Floats, y: Floats, c: Floats, s: Floats) -> tuple[Floats, Floats]:
    return x * c - y * s, y * c + x * s


def _turned(plain: Floats, position: int, how: Map, first: int = 0, size: int = DIM, base: float = 1e4) -> Floats:
    """Heads [head, dim] of which `size` elements from `first` on are turned, pairs a half of them apart."""
    angle = position * base ** (-np.arange(size // 2) / (size // 2))
    x, y = plain[:, first : first + size // 2], plain[:, first + size // 2 : first + size]
    found = plain.copy()
    found[:, first : first + size] = np.concatenate(how(x, y, np.cos(angle), np.sin(angle)), axis=1)
    return found


def _told(right: Callable[[Floats, int], Floats], wrong: Callable[[Floats, int], Floats]) -> Diagnosis:
    queries = np.random.default_rng(7).standard_normal((4, HEADS, DIM))
    sides = []
    for turn in (right, wrong):
        rows = {(Site.Q_ROPE, p): turn(query, p).ravel() for p, query in zip(POSITIONS, queries, strict=True)}
        rows |= {(Site.Q_PROJ, p): query.ravel() for p, query in zip(POSITIONS, queries, strict=True)}
        read = CacheRead(0, Site.K_CACHE, POSITIONS, np.arange(1), np.zeros((1, HEADS, DIM)))
        sides.append(Values(rows, {}, {(Site.K_CACHE, p): read for p in POSITIONS}))
    first = Address("p", POSITIONS[0], 0, Site.Q_ROPE)
    return diagnose(Suspect(first, "float64", POSITIONS, sides[0], sides[1], None)).diagnosis


def _in_place(x: Floats, y: Floats, c: Floats, s: Floats) -> tuple[Floats, Floats]:
    first = x * c - y * s
    return first, y * c + first * s


@pytest.mark.parametrize(
    ("how", "words"),
    [
        (_in_place, "as in place"),
        (lambda x, y, c, s: (x * c + y * s, y * c + x * s), "the sine is added in both"),
        (lambda x, y, c, s: (x * c, y * c), "the sines are left out"),
        (lambda x, y, c, s: (x * c - y * s, y), "the second element of each is left as it is"),
        (lambda x, y, c, s: (x * s - y * c, y * s + x * c), "exchanged"),
        (lambda x, y, c, s: (x * c - y * s, y * c + 0.5 * x * s), "a matrix that all heads share"),
    ],
)
def test_pairs_that_are_mapped_by_no_rotation_are_told_with_how(how: Map, words: str) -> None:
    told = _told(lambda q, p: _turned(q, p, _right), lambda q, p: _turned(q, p, how))

    assert told.cause == "rope_no_rotation", told
    assert words in told.text


@pytest.mark.parametrize(
    ("wrong", "cause"),
    [
        (lambda q, p: _turned(q, p + 3, _right), "rope_position_offset"),
        (lambda q, p: _turned(q, p, _right, base=3e4), "rope_base"),
        (lambda q, p: 0.9 * _turned(q, p, _right), "rope_attention_factor"),
        (lambda q, p: _turned(q, p, _right) + np.random.default_rng(p).standard_normal(q.shape), "unexplained"),
        (lambda q, p: q @ np.random.default_rng(1).standard_normal((DIM, DIM)), "unexplained"),
    ],
)
def test_rotations_and_other_errors_are_not_called_so(wrong: Callable[[Floats, int], Floats], cause: str) -> None:
    assert _told(lambda q, p: _turned(q, p, _right), wrong).cause == cause


def test_two_heads_are_too_few_for_a_matrix() -> None:
    """Each pair of a token has then as many equations as the matrix has numbers."""

    def noisy(q: Floats, p: int) -> Floats:
        return np.concatenate([np.random.default_rng(p).standard_normal((2, DIM)), _turned(q, p, _right)[2:]])

    assert _told(lambda q, p: _turned(q, p, _right), noisy).cause == "unexplained"


def test_other_elements_than_prefill_turns_are_told() -> None:
    told = _told(lambda q, p: _turned(q, p, _right, 0, 4), lambda q, p: _turned(q, p, _right, 12, 4))

    assert told.cause == "rope_partial_dims"
    assert "rotates the elements 12 to 15 of each head of its query, and prefill the first 4" in told.text


def test_a_layer_without_positions_has_no_factor_of_its_rotation() -> None:
    told = _told(lambda q, p: 1.07 * q, lambda q, p: q)
    assert told.cause == "scaled", told

    told = _told(lambda q, p: 1.07 * q, lambda q, p: _turned(q, p, _right))
    assert told.cause == "rope_angles"
    assert "which prefill does not, and multiplies it by 0.934579" in told.text
