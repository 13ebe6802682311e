"""Measured noise: second differences against roundings that are known, and when a change does not come through."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.instruments.ladder import climb, measured_bounds
from kvdrift.instruments.noise import find_noise
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import COARSE, LEAST_FLOOR, SIZES, FloorTable
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import Site
from tests.support.traces import drift_row

Floats = NDArray[np.float64]
Step = Callable[[Floats], Floats]
MODE = Mode.KV_ALIGNED
NORM, OUT = Place(0, Site.ATTN_NORM_OUT), Place(0, Site.MLP_OUT)
X = np.random.default_rng(1).standard_normal(256)
W = np.random.default_rng(2).standard_normal((64, 256)) / 16.0


def exactly(x: Floats) -> Floats:
    return W @ x


def rounded_to(dtype: Any) -> Step:
    """A product that takes and returns numbers of another dtype, whatever it is given."""
    return lambda x: (W @ x.astype(dtype).astype(np.float64)).astype(dtype).astype(np.float64)


def cancelling(x: Floats) -> Floats:
    """Terms that cancel in exact arithmetic, added in an order that leaves their roundings."""
    return np.array([float(sum(row * x) - sum((row * x)[::-1])) for row in W])


def record(name: str, step: Step, x: Floats) -> Trace:
    trace = Trace("p", "prefill" if name == "prefill" else "decode", name, "float64", (1, 2, 3, 4))
    trace.add_rows(0, Site.ATTN_NORM_OUT, (3,), (x / np.sqrt(np.mean(x * x)))[None])
    trace.add_rows(0, Site.MLP_OUT, (3,), step(x)[None])
    return trace


def floors_of(prefill: Step, decode: Step, sizes: tuple[float, ...] = SIZES) -> FloorTable:
    """Measure two passes as a capture does: larger changes follow where smaller ones were swallowed."""
    xi = np.random.default_rng(3).standard_normal(X.shape)

    def pair(shift: float) -> PassPair:
        x = X * (1.0 + shift * xi)
        return PassPair(MODE, record("prefill", prefill, x), record("decode", decode, x), (3,))

    table = FloorTable()
    size: float | None = sizes[0]
    while size is not None and size <= sizes[-1]:
        for shift in (size, -size):
            table.remember(pair(shift), shift)
        table.complete(pair(0.0))
        size = table.wants_larger(MODE)
    return table


@pytest.mark.parametrize(
    ("dtype", "size", "least", "most"),
    [
        (np.float64, SIZES[0], 0.0, 1e-14),
        (np.float32, SIZES[1], 3e-8, 3e-7),
        (np.float16, SIZES[2], 2e-4, 2e-3),
        (ml_dtypes.bfloat16, SIZES[2], 2e-3, 2e-2),
    ],
    ids=str,
)
def test_the_floor_is_the_rounding_of_the_pass_that_rounds(
    dtype: object, size: float, least: float, most: float
) -> None:
    found = floors_of(exactly, rounded_to(dtype)).of(MODE)

    assert least <= found[OUT].decode <= most
    assert found[OUT].size == size
    assert found[OUT].prefill < 1e-10, "the other pass keeps its own floor"
    assert max(found[NORM].prefill, found[NORM].decode) < LEAST_FLOOR, "what comes before is not coarse"


def test_a_small_change_alone_would_not_show_a_coarse_rounding() -> None:
    """What bfloat16 swallows has no second difference: the floor would be nothing."""
    assert floors_of(exactly, rounded_to(ml_dtypes.bfloat16), SIZES[:1]).of(MODE)[OUT].decode < 1e-3


def test_the_noise_of_one_row_is_not_held_against_the_response_of_another() -> None:
    """Where terms cancel, a row has more noise and more response than its neighbour: no change was swallowed."""
    rounded, held = rounded_to(np.float32), 0.996 * exactly(X)

    def rows(shift: float) -> Trace:
        x = X * (1.0 + shift * np.random.default_rng(3).standard_normal(X.shape))
        trace = Trace("p", "decode", "decode", "float64", (1, 2, 3, 4))
        trace.add_rows(0, Site.MLP_OUT, (2, 3), np.stack([rounded(x), rounded(x) - held]))
        return trace

    table = FloorTable()
    for shift in (*(sign * size for size in SIZES[:2] for sign in (1, -1)), 0.0):
        pair = PassPair(MODE, rows(shift), rows(shift), (2, 3))
        table.remember(pair, shift) if shift else table.complete(pair)
    noise = {address.position: drift for address, drift in _noise_of(table)}

    assert noise[3] > 50.0 * noise[2], "the rows are as unlike as they should be"
    assert table.wants_larger(MODE) is None
    assert 3e-8 * 250 <= table.of(MODE)[OUT].decode <= 3e-7 * 250


def _noise_of(table: FloorTable) -> list[tuple[Address, float]]:
    rows = table.rounding.where(lambda block: block.mode == f"{MODE} decode {SIZES[1]:.0e}")
    return list(zip(rows.addresses(), rows.rel_l2.tolist(), strict=True))


def test_a_row_of_zeros_asks_for_a_larger_change_whatever_its_neighbours_show() -> None:
    """Its steps are as large as what came through of a small change; the other row has no noise at all."""
    at_rest = exactly(X)

    def rows(shift: float) -> Trace:
        x = X * (1.0 + shift * np.random.default_rng(3).standard_normal(X.shape))
        trace = Trace("p", "decode", "decode", "float64", (1, 2, 3, 4))
        steps = 1e-8 * np.floor((exactly(x) - at_rest) / 1e-8)
        trace.add_rows(0, Site.MLP_OUT, (2, 3), np.stack([exactly(x), steps]))
        return trace

    table = FloorTable()
    for shift in (SIZES[0], -SIZES[0], 0.0):
        pair = PassPair(MODE, rows(shift), rows(shift), (2, 3))
        table.remember(pair, shift) if shift else table.complete(pair)

    assert not rows(0.0).rows[0].values[1].any()
    assert table.wants_larger(MODE) == SIZES[1]


@pytest.mark.parametrize("constant", [True, False])
def test_what_ignores_its_input_is_named(constant: bool) -> None:
    def ignoring(x: Floats) -> Floats:
        return exactly(X)

    found = floors_of(ignoring if constant else exactly, ignoring)

    assert [(item.place, item.sides) for item in found.unmoved(MODE)] == [
        (OUT, ("prefill", "decode") if constant else ("decode",))
    ]
    assert found.of(MODE)[OUT].size == SIZES[0], "it is not a coarse rounding either"


def test_a_zero_does_not_ignore_its_input() -> None:
    found = floors_of(lambda x: 0.0 * x, lambda x: 0.0 * x)

    assert found.unmoved(MODE) == ()
    assert found.wants_larger(MODE) == SIZES[1] or found.of(MODE)[OUT].sum == 0.0


def test_terms_that_cancel_are_noise_in_both_passes() -> None:
    found = floors_of(cancelling, lambda x: cancelling(x[::-1][::-1])).of(MODE)[OUT]

    assert found.cancels
    assert found.sum <= 8.0


def climbed(floors: FloorTable, drift: float) -> object:
    at = Address("p", 3, 0, Site.MLP_OUT)
    rows = [
        drift_row(MODE, rung, address=at, rel_l2=drift, n_elements=64, max_abs=1e-9) for rung in ("bfloat16", "float64")
    ]
    return climb(DriftTable.of(rows), MODE, "bfloat16", floors=floors).excess[at]


def test_the_bound_is_sixteen_times_the_noise_of_both_passes() -> None:
    floors = floors_of(rounded_to(np.float32), rounded_to(np.float32))
    noise = floors.of(MODE)[OUT].sum

    assert measured_bounds(floors, MODE)[OUT] == pytest.approx(16.0 * noise * 1e-6 ** (-1 / 64))
    assert climbed(floors, 0.9 * 16.0 * noise) < 1.0 < climbed(floors, 1.3 * 16.0 * noise)  # type: ignore[operator]


def test_below_512_roundings_nothing_is_told_from_float64() -> None:
    floors = floors_of(exactly, exactly)

    assert measured_bounds(floors, MODE)[OUT] == 2.0**-40
    assert climbed(floors, 1e-5) == pytest.approx(1e-5 * 2.0**40)
    assert climbed(floors, np.nan) != climbed(floors, np.nan), "NaN stays, and is beyond every bound"


@pytest.mark.parametrize("value", [np.inf, 1e9])
def test_a_value_of_nothing_but_roundings_is_judged_by_the_larger_value(value: float) -> None:
    """Where terms cancel, prefill may be exactly nothing; decode is then off by all of its own size."""
    floors = floors_of(cancelling, cancelling)

    assert climbed(floors, value) < 0.1  # type: ignore[operator]
    assert climbed(floors_of(exactly, exactly), value) > 1e11  # type: ignore[operator]


def test_noise_of_one_pass_above_the_native_rounding_is_no_rounding() -> None:
    def noisy(size: float) -> Step:
        return lambda x: exactly(x) * (1.0 + size * np.random.default_rng(abs(hash(x.tobytes()))).standard_normal(64))

    def begins(prefill: Step, decode: Step, native: str) -> list[tuple[Place, tuple[str, ...], bool]]:
        found = find_noise(floors_of(prefill, decode), MODE, Arithmetic(native)).begins
        return [(item.place, item.sides, item.is_no_rounding) for item in found]

    assert begins(exactly, noisy(0.02), "bfloat16") == [(OUT, ("decode",), True)]
    assert begins(noisy(0.02), exactly, "bfloat16") == [(OUT, ("prefill",), True)]
    assert begins(exactly, noisy(1e-4), "float32") == [(OUT, ("decode",), True)]
    assert begins(exactly, rounded_to(ml_dtypes.bfloat16), "bfloat16") == [(OUT, ("decode",), False)]
    assert begins(exactly, rounded_to(np.float32), "float32") == [(OUT, ("decode",), False)]
    assert begins(exactly, rounded_to(ml_dtypes.bfloat16), "float32") == [(OUT, ("decode",), True)]
    assert begins(noisy(0.02), noisy(0.02), "bfloat16") == [(OUT, ("prefill", "decode"), False)]
    assert begins(exactly, exactly, "bfloat16") == []
    assert COARSE < 1e-8


def test_a_pair_whose_noise_was_not_measured_makes_the_ladder_incomplete() -> None:
    other = Address("p", 3, 1, Site.MLP_OUT)
    rows = [drift_row(MODE, rung, address=other) for rung in ("bfloat16", "float64")]
    evidence = climb(DriftTable.of(rows), MODE, "bfloat16", floors=floors_of(exactly, exactly)).evidence

    assert not evidence.valid
    assert evidence.supports is None
    assert evidence.reason == "1 of 1 pairs were not measured at float64, or their noise was not"


def on_grid(start: float) -> Step:
    """Numbers of few bits; the first lies `start` steps above one of the grid, and may leave it."""

    def step(x: Floats) -> Floats:
        first = x[0] - X[0] % 2.0**-4 + start * 2.0**-4
        return np.round(np.append(first, x[1:]) * 2.0**4) / 2.0**4

    return step


def probabilities(prefill: Step, decode: Step) -> FloorTable:
    """The floors of a place where a swallowed change does not ask for a larger one by itself."""
    xi, table = np.random.default_rng(3).standard_normal(X.shape), FloorTable()

    def trace(name: str, step: Step, x: Floats) -> Trace:
        found = Trace("p", "prefill" if name == "prefill" else "decode", name, "float64", (1, 2, 3, 4))
        found.add_rows(0, Site.ATTN_PROBS, (3,), step(x)[None])
        return found

    def pair(shift: float) -> PassPair:
        x = X * (1.0 + shift * xi)
        return PassPair(MODE, trace("prefill", prefill, x), trace("decode", decode, x), (3,))

    size: float | None = SIZES[0]
    while size is not None:
        for shift in (size, -size):
            table.remember(pair(shift), shift)
        table.complete(pair(0.0))
        size = table.wants_larger(MODE)
    return table


def test_noise_of_a_grid_that_one_pass_leaves_by_chance_is_that_of_both() -> None:
    by_chance = find_noise(probabilities(on_grid(0.5), on_grid(0.0)), MODE, Arithmetic("float32")).begins
    alone = find_noise(probabilities(on_grid(0.5), lambda x: x), MODE, Arithmetic("float32")).begins

    assert not any(item.is_no_rounding for item in by_chance)
    assert [item.sides for item in alone if item.is_no_rounding] == [("prefill",)]
