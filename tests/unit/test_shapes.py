"""The shape of an error is told from values alone, and that of its neighbours is not."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.diagnosis.shape import shape_of
from kvdrift.trace.model import CacheRead
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.shapes import ErrorShape
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]
POSITIONS = (11, 12, 13, 14)
HEADS, DIM = 4, 16


def _read(site: Site, rows: Floats) -> dict[tuple[Site, int], CacheRead]:
    return {(site, p): CacheRead(0, site, POSITIONS, np.arange(len(rows)), rows) for p in POSITIONS}


def _suspect(site: Site, right: Floats, wrong: Floats, unit: float = 2.0**-53) -> Suspect:
    """Vectors [position, head, element] of both passes, with a cache of heads of as many elements."""
    cache = _read(Site.K_CACHE, np.ones((3, 2, DIM))) | _read(Site.V_CACHE, np.ones((3, 2, DIM)))
    first, second = (
        Values({(site, p): rows.ravel() for p, rows in zip(POSITIONS, values, strict=True)}, {}, cache)
        for values in (right, wrong)
    )
    return Suspect(Address("p", POSITIONS[0], 0, site), "float64", POSITIONS, first, second, None, unit=unit)


def _of(change: Callable[[Floats], Floats | None], site: Site = Site.ATTN_CTX, unit: float = 2.0**-53) -> ErrorShape:
    """The shape of what `change` does to a copy of random rows [position, head, element]; rounding comes on top."""
    random = np.random.default_rng(7)
    right = random.standard_normal((len(POSITIONS), HEADS, DIM))
    wrong = right.copy()
    returned = change(wrong)
    wrong = wrong if returned is None else returned
    wrong = wrong * (1.0 + unit * random.uniform(-1.0, 1.0, wrong.shape))
    found = shape_of(_suspect(site, right, wrong, unit))
    assert found is not None
    return found


def _noise(rows: Floats) -> Floats:
    return np.asarray(np.random.default_rng(5).standard_normal(rows.shape))


def _set(index: object, make: Callable[[Floats], Floats]) -> Callable[[Floats], None]:
    def change(rows: Floats) -> None:
        rows[index] = make(rows[index])  # type: ignore[call-overload]

    return change


EVERY = (slice(None), slice(None), slice(None))
# What is done to the rows, and where the shape must say that it was done: extent, heads, elements.
EXTENTS = [
    (EVERY, "all", (), None),
    ((slice(None), 2), "heads", (2,), None),
    ((slice(None), slice(2, 4)), "heads", (2, 3), None),
    ((slice(None), slice(None), slice(4, 8)), "block", (), (4, 7)),
    ((slice(None), slice(None), slice(3, 8)), "tile", (), (3, 7)),
    ((slice(None), slice(None), slice(13, 16)), "tail", (), (13, 15)),
    ((slice(None), 1, slice(4, 8)), "block", (1,), (4, 7)),
    ((slice(None), 3, 5), "element", (3,), (5, 5)),
]


@pytest.mark.parametrize("unit", [2.0**-53, 2.0**-9], ids=["float64", "bfloat16"])
@pytest.mark.parametrize(("index", "extent", "heads", "elements"), EXTENTS)
def test_where_an_error_is(
    index: object, extent: str, heads: tuple[int, ...], elements: tuple[int, int] | None, unit: float
) -> None:
    found = _of(_set(index, lambda part: part + 2.0 + _noise(part)), unit=unit)

    assert (found.extent, found.heads, found.elements) == (extent, heads, elements), found.text
    assert found.positions == POSITIONS
    assert "at every step" in found.text


def test_a_tail_of_the_whole_vector_is_one_where_heads_say_nothing() -> None:
    found = _of(lambda rows: rows.reshape(4, -1).__setitem__((slice(None), slice(40, 64)), 0.0), Site.MLP_OUT)

    assert (found.extent, found.elements, found.heads) == ("tail", (40, 63), ())
    assert "elements 40 to 63 of 64, the tail" in found.text


def test_elements_here_and_there_are_scattered() -> None:
    def change(rows: Floats) -> None:
        rows.reshape(4, -1)[:, ::7] += 1.0 + np.abs(_noise(rows.reshape(4, -1)[:, ::7]))

    found = _of(change, Site.MLP_OUT)

    assert found.extent == "scattered"
    assert "10 scattered elements of 64" in found.text


def _another_each(rows: Floats) -> Floats:
    return np.asarray(rows * np.array([0.5, 0.8, 1.2, 1.7])[:, None, None])


def _by_head(rows: Floats) -> Floats:
    return np.asarray(rows * np.array([0.5, 0.8, 1.2, 1.7])[None, :, None])


def _rank_one(rows: Floats) -> Floats:
    sizes = np.array([1.0, -2.0, 0.5, 3.0])[:, None, None]
    return rows + sizes * _noise(rows[:1])


RELATIONS: list[tuple[Callable[[Floats], Floats], str, float | None, str]] = [
    (lambda rows: 0.0 * rows, "zeros", None, "has zeros"),
    (lambda rows: -rows, "sign_flipped", None, "other sign"),
    (lambda rows: 1.25 * rows, "factor", 1.25, "decode has 1.25"),
    (lambda rows: -0.5 * rows, "factor", -0.5, "decode has -0.5"),
    (_another_each, "factor_by_row", None, "changes with the position"),
    (_by_head, "factor_by_head", None, ", 0.8, 1.2, 1.7"),
    (lambda rows: rows + 0.75, "offset", 0.75, " more in every element"),
    (lambda rows: rows + _noise(rows[:1]), "same_vector", None, "same vector"),
    (_rank_one, "one_direction", None, "rank one"),
    (lambda rows: rows[:, [1, 0, 2, 3]], "heads_permuted", None, "head 0 has that of head 1"),
    (lambda rows: rows[:, [0, 0, 2, 3]], "heads_permuted", None, "head 1 has that of head 0"),
    (lambda rows: np.roll(rows, 1, axis=0), "rows_permuted", None, "another one"),
    (
        lambda rows: np.roll(rows.reshape(4, -1), 5, axis=1).reshape(rows.shape),
        "elements_permuted",
        None,
        "moved by +5",
    ),
    (lambda rows: rows.reshape(4, -1)[:, ::-1].reshape(rows.shape), "elements_permuted", None, "backwards"),
    (
        lambda rows: rows.transpose(0, 2, 1).reshape(rows.shape),
        "elements_permuted",
        None,
        "heads and elements exchanged",
    ),
    (lambda rows: rows + _noise(rows), "none", None, "no simple relation"),
]


@pytest.mark.parametrize("unit", [2.0**-53, 2.0**-9], ids=["float64", "bfloat16"])
@pytest.mark.parametrize(("change", "relation", "size", "told"), RELATIONS)
def test_what_an_error_has_to_do_with_prefill(
    change: Callable[[Floats], Floats], relation: str, size: float | None, told: str, unit: float
) -> None:
    found = _of(change, unit=unit)

    assert found.relation == relation, found.text
    assert found.size == (None if size is None else pytest.approx(size, rel=16 * unit))
    assert told in found.text
    assert (found.explained > 0.99) == (relation != "none")


def test_a_relation_is_that_of_the_part_that_differs() -> None:
    found = _of(_set((slice(None), 1, slice(8, 16)), lambda part: -2.0 * part))

    assert (found.extent, found.heads, found.elements) == ("tail", (1,), (8, 15))
    assert found.relation == "factor"
    assert found.size == pytest.approx(-2.0)


@pytest.mark.parametrize(
    ("rows", "positions", "told"),
    [
        (slice(0, 4), (11, 12, 13, 14), "at every step"),
        (slice(2, 4), (11, 13, 14), "at the positions 11, 13, 14 of 4 probed"),
        (slice(0, 1), (11,), "at position 11 alone"),
    ],
)
def test_since_when_an_error_is_there(rows: slice, positions: tuple[int, ...], told: str) -> None:
    """The address is the first position, so that it is always among them."""

    def change(values: Floats) -> None:
        values[rows] *= 1.5
        values[0] *= 1.5 if rows.start else 1.0

    found = _of(change)

    assert found.positions == positions
    assert told in found.text


def test_an_error_that_begins_later_says_with_which_step() -> None:
    right = np.random.default_rng(1).standard_normal((4, HEADS, DIM))
    wrong = right.copy()
    wrong[2:] *= 1.5
    suspect = _suspect(Site.ATTN_CTX, right, wrong)
    late = Suspect(
        Address("p", 13, 0, Site.ATTN_CTX), "float64", POSITIONS, suspect.prefill, suspect.decode, None, unit=2.0**-53
    )
    found = shape_of(late)

    assert found is not None
    assert found.positions == (13, 14)
    assert "from position 13 on, step 3 of 4" in found.text


@pytest.mark.parametrize(("bad", "told"), [([5], "slot 5"), ([8, 9], "the slots from 8 on"), ([2, 3], "slots 2 to 3")])
def test_the_slots_of_a_cache_are_told(bad: list[int], told: str) -> None:
    rows = np.random.default_rng(2).standard_normal((10, 2, DIM))
    wrong = rows.copy()
    wrong[bad, 1] *= 0.5
    first, second = (Values({}, {}, _read(Site.K_CACHE, v)) for v in (rows, wrong))
    suspect = Suspect(Address("p", 11, 0, Site.K_CACHE), "float64", POSITIONS, first, second, None)

    found = shape_of(suspect)

    assert found is not None
    assert found.slots == tuple(bad)
    assert (found.extent, found.heads, found.relation) == ("heads", (1,), "factor")
    assert found.size == pytest.approx(0.5)
    assert told in found.text


@pytest.mark.parametrize("sick", ["prefill", "decode"])
def test_the_pass_that_breaks_its_own_sum_is_off(sick: str) -> None:
    random = np.random.default_rng(4)
    resid, out = random.standard_normal(8), random.standard_normal(8)

    def side(name: str) -> Values:
        total = resid + out * (0.5 if name == sick else 1.0)
        places = {Site.LAYER_IN: resid, Site.ATTN_OUT: out, Site.RESID_ATTN: total}
        return Values({(site, 11): value for site, value in places.items()}, {}, {})

    suspect = Suspect(
        Address("p", 11, 0, Site.RESID_ATTN), "float64", (11,), side("prefill"), side("decode"), None, unit=2.0**-53
    )
    found = shape_of(suspect)

    assert found is not None
    assert found.guilty == sick
    assert f"{sick} is the pass that is off" in found.text


def test_where_no_rule_tells_the_pass_other_evidence_does() -> None:
    right = np.random.default_rng(1).standard_normal((4, HEADS, DIM))
    suspect = _suspect(Site.MLP_OUT, right, 1.5 * right)

    alone, told = shape_of(suspect), shape_of(suspect, "prefill")

    assert alone is not None
    assert alone.guilty is None
    assert told is not None
    assert told.guilty == "prefill"


def test_a_value_that_is_no_number_is_told_with_its_place() -> None:
    def change(rows: Floats) -> None:
        rows[:, 2] = np.nan

    found = _of(change)

    assert (found.extent, found.heads, found.relation) == ("heads", (2,), "nonfinite")
    assert "decode has NaN or infinity" in found.text


def test_equal_values_have_no_shape() -> None:
    right = np.random.default_rng(1).standard_normal((4, HEADS, DIM))

    assert shape_of(_suspect(Site.ATTN_CTX, right, right.copy())) is None
