"""Long cache reads that follow upon one another: each as if it was measured by itself, whatever changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.pairing.align import Pair
from kvdrift.pairing.kernels import LONG, DriftFigures, hash_rows, measure
from kvdrift.pairing.measure import _slots
from kvdrift.pairing.series import LongRead, ReadSeries
from kvdrift.vocabulary.sites import Site

WIDTH = 192
N = LONG // WIDTH + 40
# What is added up by row, and not by block.
SUMS = {"rel_l2", "cosine", "bias", "gain"}
Rows = NDArray[np.generic]


def rows(seed: int, dtype: Any = np.float32, n: int = N) -> Rows:
    return np.random.default_rng(seed).standard_normal((n, WIDTH)).astype(dtype)


def off(values: Rows, seed: int) -> Rows:
    noise = 1.0 + 1e-3 * np.random.default_rng(seed).standard_normal(values.shape)
    return (values.astype(np.float64) * noise).astype(values.dtype)


def pair(prefill: Rows, decode: Rows, position: int, slots: Sequence[int] | None = None) -> Pair:
    at = np.arange(len(prefill)) if slots is None else np.array(slots)
    first, second = (side.reshape(1, -1) for side in (prefill, decode))
    return Pair(0, Site.K_CACHE, (position,), first, second, slots=at, row_size=WIDTH)


def assert_is_as_alone(found: LongRead | None, values: Pair) -> None:
    assert found is not None
    alone = measure(values.prefill, values.decode)
    for field in fields(DriftFigures):
        got, wanted = getattr(found.figures, field.name), getattr(alone, field.name)
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape), field.name
        if field.name in SUMS:
            np.testing.assert_allclose(got, wanted, rtol=1e-11, atol=1e-15, err_msg=field.name)
        else:
            np.testing.assert_array_equal(got, wanted, err_msg=field.name)
    assert [found.slots] == _slots([values], alone)
    assert found.digests == tuple(hash_rows(side)[0] for side in (values.prefill, values.decode))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16], ids=str)
def test_reads_that_grow(dtype: Any) -> None:
    prefill = rows(1, dtype)
    decode = off(prefill, 2)
    series = ReadSeries(with_hashes=True)
    for n in (N - 8, N - 7, N - 3, N):
        values = pair(prefill[:n], decode[:n].copy(), n - 1)

        assert_is_as_alone(series.measure([values]), values)


def test_reads_that_grow_by_more_than_was_kept_of_the_largest() -> None:
    """What comes later differs by less, so that the 99th percentile falls behind all that was kept."""
    prefill = rows(1, n=3 * N)
    decode = off(prefill, 2)
    decode[N:] = prefill[N:].astype(np.float32) * np.float32(1.0 + 2.0**-20)
    series = ReadSeries(with_hashes=True)
    for n in (N, 3 * N):
        values = pair(prefill[:n], decode[:n].copy(), n - 1)

        assert_is_as_alone(series.measure([values]), values)


def test_reads_that_shrink_with_a_row_of_their_own() -> None:
    """As the aligned mode reads, from the last position to the first: all rows but the own one are prefill's."""
    prefill = rows(1)
    series = ReadSeries(with_hashes=True)
    for n in (N, N - 1, N - 2):
        decode = prefill[:n].copy()
        decode[-1] = off(decode[-1:], n)[0]
        values = pair(prefill[:n], decode, n - 1)

        assert_is_as_alone(series.measure([values]), values)


@pytest.mark.parametrize("side", ["prefill", "decode"])
@pytest.mark.parametrize("at", [0, 17, N - 9])
def test_a_row_that_changed_between_two_reads_is_measured_again(side: str, at: int) -> None:
    prefill = rows(1)
    decode = off(prefill, 2)
    series = ReadSeries(with_hashes=True)
    first = pair(prefill[: N - 8].copy(), decode[: N - 8].copy(), N - 9)
    assert_is_as_alone(series.measure([first]), first)
    changed = prefill if side == "prefill" else decode
    changed[at] += np.float32(3.0)
    second = pair(prefill[: N - 7], decode[: N - 7], N - 8)

    assert_is_as_alone(series.measure([second]), second)


def test_a_read_of_fewer_rows_and_one_with_a_row_that_no_longer_differs() -> None:
    prefill = rows(1)
    decode = off(prefill, 2)
    decode[-1] += np.float32(9.0)
    equal = decode[: N - 1].copy()
    equal[5] = prefill[5]
    series = ReadSeries(with_hashes=True)
    for second in (decode, decode[: N - 1].copy(), equal):
        values = pair(prefill[: len(second)], second, len(second) - 1)

        assert_is_as_alone(series.measure([values]), values)


def test_a_window_that_moves_on() -> None:
    prefill = rows(1, n=N + 4)
    decode = off(prefill, 2)
    series = ReadSeries(with_hashes=True)
    for start in (0, 1, 4):
        here = slice(start, start + N)
        values = pair(prefill[here], decode[here], start + N - 1, range(start, start + N))

        assert_is_as_alone(series.measure([values]), values)


def test_equal_reads_and_reads_that_differ_in_few_elements() -> None:
    prefill = rows(1)
    decode = prefill.copy()
    decode[3, 5] = np.nextafter(decode[3, 5], np.float32(9.0))
    zeros = np.zeros_like(prefill)
    for first, second in ((prefill, prefill.copy()), (prefill, decode), (zeros, zeros.copy())):
        values = pair(first, second, N - 1)

        assert_is_as_alone(ReadSeries(with_hashes=True).measure([values]), values)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e-170, 1e170])
@pytest.mark.parametrize("side", [0, 1])
def test_what_cannot_be_squared_is_left_to_the_careful_way(value: float, side: int) -> None:
    prefill = rows(1, np.float64)
    both = [prefill.astype(np.float64), off(prefill, 2).astype(np.float64)]
    series = ReadSeries()
    assert series.measure([pair(both[0], both[1], N - 1)]) is not None
    both[side] = both[side] * value if np.isfinite(value) else both[side].copy()
    if not np.isfinite(value):
        both[side][7, 7] = value

    assert series.measure([pair(both[0], both[1], N - 1)]) is None


def test_short_reads_and_several_at_once_are_measured_otherwise() -> None:
    prefill = rows(1)
    short, long = pair(prefill[:9], prefill[:9], 8), pair(prefill, prefill, N - 1)

    assert ReadSeries().measure([short]) is None
    assert ReadSeries().measure([long, long]) is None
