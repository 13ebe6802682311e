"""What is true of the metrics whatever the values are."""

import hashlib
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from kvdrift.errors import AlignmentError
from kvdrift.pairing.kernels import Compared, DriftFigures, hash_rows, measure, measure_all
from kvdrift.trace.model import Array

LAW = settings(deadline=None, derandomize=True, max_examples=60, database=None)

BF16 = np.dtype(ml_dtypes.bfloat16)
FLOATS = [np.dtype(np.float64), np.dtype(np.float32), np.dtype(np.float16), BF16]
FP8 = [np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2)]
FIGURES = ("max_abs", "max_ulp", "rel_l2", "p99_abs", "cosine", "bias", "n_nonfinite", "equal")

finite = st.floats(-1e3, 1e3, allow_subnormal=False)
dtypes = st.sampled_from(FLOATS)
float32s = st.floats(-(2.0**100), 2.0**100, width=32)


@st.composite
def rows(draw: st.DrawFn, min_size: int = 1, elements: st.SearchStrategy[float] = finite) -> Array:
    """One row [1, n] of finite values in one of the dtypes."""
    n = draw(st.integers(min_size, 40))
    values = draw(hnp.arrays(np.float64, (1, n), elements=elements))
    return values.astype(draw(dtypes))


@st.composite
def noisy(draw: st.DrawFn) -> tuple[Array, Array]:
    """A row and the same row with noise of some size."""
    row = draw(rows())
    size = draw(st.sampled_from([0.0, 1e-9, 1e-3, 0.1, 1.0]))
    noise = np.random.default_rng(draw(st.integers(0, 2**32))).normal(size=row.shape)
    return row, (row.astype(np.float64) * (1.0 + size * noise)).astype(row.dtype)


def one(figures: DriftFigures, name: str) -> float:
    return float(getattr(figures, name)[0])


def any_bits(dtype: np.dtype[np.generic], seed: int, n: int = 33) -> Array:
    """A row of random bit patterns: NaN of every payload, infinities, subnormals and both zeros among them."""
    return np.frombuffer(np.random.default_rng(seed).bytes(n * dtype.itemsize), dtype=dtype).reshape(1, n).copy()


# --------------------------------------------------------------------------------------------------------- identity


@LAW
@given(st.sampled_from(FLOATS + FP8), st.integers(0, 2**32))
def test_any_bits_compared_with_themselves_do_not_drift(dtype: np.dtype[np.generic], seed: int) -> None:
    row = any_bits(dtype, seed)
    figures = measure(row, row.copy())
    assert figures.equal.all()
    for name in ("max_abs", "max_ulp", "rel_l2", "p99_abs", "bias"):
        assert one(figures, name) == 0.0
    assert one(figures, "cosine") == pytest.approx(1.0)


@LAW
@given(noisy())
def test_equal_bits_are_the_only_way_to_be_called_equal(pair: tuple[Array, Array]) -> None:
    figures = measure(*pair)
    differ = sum(a.tobytes() != b.tobytes() for a, b in zip(pair[0].ravel(), pair[1].ravel(), strict=True))
    assert bool(figures.equal[0]) == (differ == 0)
    assert one(figures, "n_differ") == differ


# ---------------------------------------------------------------------------------------------------------- scaling


@LAW
@given(noisy(), st.integers(-3, 3))
def test_scaling_both_sides_by_a_power_of_two_changes_no_relative_figure(
    pair: tuple[Array, Array], exponent: int
) -> None:
    factor = 2.0**exponent
    both = [side.astype(np.float64) for side in pair]
    scaled = [(side * factor).astype(pair[0].dtype) for side in both]
    exact = all(np.array_equal(s.astype(np.float64), b * factor) for s, b in zip(scaled, both, strict=True))
    normal = np.finfo(np.float64).tiny if pair[0].dtype == np.float64 else float(ml_dtypes.finfo(pair[0].dtype).tiny)  # type: ignore[no-untyped-call]
    magnitudes = np.abs(np.concatenate(both))
    floor = normal * 8  # the spacing of subnormal numbers is not relative, so ULP would change
    if not exact or (magnitudes[magnitudes > 0] < floor).any() or not np.isfinite(scaled[0].astype(float)).all():
        return
    before, after = measure(*pair), measure(*scaled)
    for name in ("rel_l2", "cosine", "bias"):
        assert one(after, name) == pytest.approx(one(before, name), rel=1e-12, abs=1e-15)
    # Crossing zero counts the numbers in between, and there are more of them the larger the two are.
    if (both[0] * both[1] > 0).all():
        assert one(after, "max_ulp") == one(before, "max_ulp")
    assert one(after, "max_abs") == one(before, "max_abs") * factor


@pytest.mark.parametrize("exponent", [-1000, -600, -540, 0, 505, 600, 1000])
def test_relative_figures_neither_underflow_nor_overflow_at_float64(exponent: int) -> None:
    prefill = np.array([[1.0, -0.5, 0.25, 2.0]])
    decode = prefill * (1.0 + np.array([[1e-5, -1e-5, 2e-5, 1e-5]]))
    before = measure(prefill, decode)
    after = measure(np.ldexp(prefill, exponent), np.ldexp(decode, exponent))
    for name in ("rel_l2", "cosine", "bias"):
        assert one(after, name) == pytest.approx(one(before, name), rel=1e-9)


def test_a_difference_too_small_to_be_squared_still_drifts() -> None:
    prefill = np.array([[1.0, 0.0]])
    decode = np.array([[1.0, 1e-200]])
    assert one(measure(prefill, decode), "rel_l2") == pytest.approx(1e-200)


def test_a_difference_too_large_for_float64_is_infinite_and_not_a_warning() -> None:
    top = np.finfo(np.float64).max
    figures = measure(np.array([[top, 1.0]]), np.array([[-top, 1.0]]))
    assert one(figures, "max_abs") == math.inf
    assert one(figures, "rel_l2") == math.inf


# ------------------------------------------------------------------------------------------------------------- order


@LAW
@given(noisy(), st.integers(0, 2**32))
def test_the_order_of_elements_is_irrelevant(pair: tuple[Array, Array], seed: int) -> None:
    order = np.random.default_rng(seed).permutation(pair[0].shape[1])
    before, after = measure(*pair), measure(pair[0][:, order], pair[1][:, order])
    for name in FIGURES:
        # The bias is a sum with cancellation: its rounding is that of the sum, whatever little is left of it.
        tolerance = 1e-12 * (1.0 + one(before, "rel_l2"))
        assert one(after, name) == pytest.approx(one(before, name), rel=1e-9, abs=tolerance)


@LAW
@given(st.lists(noisy(), min_size=1, max_size=4))
def test_each_pair_is_measured_by_itself(pairs: list[tuple[Array, Array]]) -> None:
    width = min(pair[0].shape[1] for pair in pairs)
    sides = [np.concatenate([p[i][:, :width].astype(np.float32) for p in pairs]) for i in (0, 1)]
    together = measure(*sides)
    for index in range(len(pairs)):
        alone = measure(sides[0][index : index + 1], sides[1][index : index + 1])
        for name in FIGURES:
            assert float(getattr(together, name)[index]) == one(alone, name)


# ------------------------------------------------------------------------------------------------------------- noise


@LAW
@given(rows(min_size=4), st.integers(0, 2**32), st.floats(1.0, 16.0))
def test_more_of_the_same_noise_never_lowers_the_drift(row: Array, seed: int, factor: float) -> None:
    prefill = row.astype(np.float64)
    noise = np.random.default_rng(seed).normal(size=row.shape)
    less, more = measure(prefill, prefill + 1e-3 * noise), measure(prefill, prefill + 1e-3 * factor * noise)
    for name in ("max_abs", "rel_l2", "p99_abs"):
        assert one(more, name) >= one(less, name) * (1.0 - 1e-9)


def test_the_mean_drift_rises_with_the_size_of_fresh_noise() -> None:
    generator = np.random.default_rng(20260101)
    prefill = generator.normal(size=(200, 64)).astype(np.float32)
    means = []
    for size in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2):
        decode = (prefill * (1.0 + size * generator.normal(size=prefill.shape))).astype(np.float32)
        means.append(float(measure(prefill, decode).rel_l2.mean()))
    assert means == sorted(means)
    assert means[-1] == pytest.approx(1e-2, rel=0.05)


# -------------------------------------------------------------------------------------------------------- non-finite


@LAW
@given(rows(min_size=1), st.integers(0, 2**32), st.sampled_from([math.nan, math.inf, -math.inf]), st.booleans())
def test_one_nan_or_infinity_on_one_side_is_never_averaged_away(
    row: Array, seed: int, value: float, in_prefill: bool
) -> None:
    broken = row.copy()
    broken[0, seed % row.shape[1]] = value
    figures = measure(broken, row) if in_prefill else measure(row, broken)
    for name in ("max_abs", "rel_l2", "p99_abs", "max_ulp"):
        assert one(figures, name) == math.inf
    assert math.isnan(one(figures, "cosine"))
    assert math.isnan(one(figures, "bias"))
    assert one(figures, "n_nonfinite") == 1
    assert not figures.equal[0]


def test_infinities_of_opposite_sign_are_not_the_same() -> None:
    figures = measure(np.array([[1.0, math.inf]]), np.array([[1.0, -math.inf]]))
    assert one(figures, "rel_l2") == math.inf


def test_nan_of_another_payload_is_not_the_same() -> None:
    bits = np.array([[0x7FC00000, 0x7FC00001]], dtype=np.uint32)
    prefill = bits.view(np.float32)
    figures = measure(prefill, prefill[:, ::-1].copy())
    assert one(figures, "rel_l2") == math.inf


@LAW
@given(rows(min_size=2), st.sampled_from([math.nan, math.inf, -math.inf]))
def test_the_same_non_finite_bits_on_both_sides_do_not_drift_and_are_counted(row: Array, value: float) -> None:
    both = row.copy()
    both[0, 0] = value
    figures = measure(both, both.copy())
    assert one(figures, "rel_l2") == 0.0
    assert one(figures, "n_nonfinite") == 1
    assert figures.equal[0]
    moved = both.copy()
    moved[0, 1] = row[0, 1].astype(np.float64) + 512.0
    assert one(measure(both, moved), "rel_l2") > 0.0


def test_values_where_the_reference_is_zero_are_infinitely_far_off() -> None:
    figures = measure(np.zeros((1, 3)), np.array([[0.0, 0.0, 1e-30]]))
    assert one(figures, "rel_l2") == math.inf
    assert one(figures, "cosine") == 0.0


# --------------------------------------------------------------------------------------------------------------- ULP


def ordered_values(dtype: np.dtype[np.generic]) -> Array:
    """Every finite number of a two-byte dtype, ascending, the two zeros as one."""
    every = np.arange(2**16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):
        numbers = every.astype(np.float64)
    kept = every[np.isfinite(numbers) & ~((numbers == 0.0) & np.signbit(numbers))]
    ascending: Array = kept[np.argsort(kept.astype(np.float64))]
    return ascending


@pytest.mark.parametrize("dtype", [np.dtype(np.float16), BF16], ids=str)
def test_ulp_counts_along_all_numbers_of_a_two_byte_dtype(dtype: np.dtype[np.generic]) -> None:
    numbers = ordered_values(dtype)
    generator = np.random.default_rng(7)
    for steps in (1, 2, 100, 5000, len(numbers) - 1):
        start = generator.integers(0, len(numbers) - steps, size=4000)
        figures = measure(numbers[start].reshape(-1, 1), numbers[start + steps].reshape(-1, 1))
        assert (figures.max_ulp == steps).all()
    neighbours = measure(numbers[:-1].reshape(-1, 1), numbers[1:].reshape(-1, 1))
    assert (neighbours.max_ulp == 1).all()


@LAW
@given(
    st.sampled_from([np.float32, np.float64]),
    st.floats(-(2.0**100), 2.0**100, width=32),
    st.integers(0, 40),
    st.booleans(),
)
def test_ulp_counts_the_steps_of_nextafter(kind: type[np.floating], start: float, steps: int, up: bool) -> None:
    value = kind(start)
    end = value
    for _ in range(steps):
        end = np.nextafter(end, kind(np.inf if up else -np.inf))
    assert one(measure(np.array([[value]]), np.array([[end]])), "max_ulp") == steps


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_both_zeros_are_no_step_apart_and_not_equal(dtype: np.dtype[np.generic]) -> None:
    figures = measure(np.array([[0.0]]).astype(dtype), np.array([[-0.0]]).astype(dtype))
    assert one(figures, "max_ulp") == 0.0
    assert not figures.equal[0]


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_ulp_runs_on_through_zero(kind: type[np.floating]) -> None:
    smallest = np.nextafter(kind(0), kind(1))
    figures = measure(np.array([[-3 * smallest]]), np.array([[2 * smallest]]))
    assert one(figures, "max_ulp") == 5.0


def test_ulp_over_the_whole_range_of_float64_does_not_wrap_around() -> None:
    top = np.finfo(np.float64).max
    figures = measure(np.array([[top]]), np.array([[-top]]))
    assert one(figures, "max_ulp") == pytest.approx(2.0 * float(np.float64(top).view(np.int64)))


# --------------------------------------------------------------------------------------------------- other figures


@LAW
@given(st.integers(1, 400), st.integers(0, 2**32))
def test_p99_is_an_order_statistic_as_numpy_defines_it(n: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    prefill, decode = generator.normal(size=(1, n)), generator.normal(size=(1, n))
    expected = np.quantile(np.abs(decode - prefill), 0.99, method="inverted_cdf")
    assert one(measure(prefill, decode), "p99_abs") == expected


@pytest.mark.parametrize("n", [1, 2, 99, 100, 101, 200, 300, 700, 1100, 10_000])
def test_p99_leaves_at_most_one_hundredth_above_it(n: int) -> None:
    decode = np.arange(1.0, n + 1)[np.newaxis]
    assert one(measure(np.zeros((1, n)), decode), "p99_abs") == math.ceil(99 * n / 100)


def test_the_figures_of_a_pair_worked_out_by_hand() -> None:
    figures = measure(np.array([[3.0, 4.0]]), np.array([[3.0, 4.5]]))
    assert one(figures, "max_abs") == 0.5
    assert one(figures, "rel_l2") == pytest.approx(0.1)
    assert one(figures, "cosine") == pytest.approx((9 + 18) / (5 * math.sqrt(9 + 20.25)))
    assert one(figures, "bias") == pytest.approx(0.25 / (5 / math.sqrt(2)))


def test_the_bias_has_the_sign_of_decode_minus_prefill() -> None:
    prefill = np.ones((1, 8))
    assert one(measure(prefill, prefill + 0.5), "bias") == pytest.approx(0.5)
    assert one(measure(prefill, prefill - 0.5), "bias") == pytest.approx(-0.5)


# ------------------------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("prefill", "decode", "message"),
    [
        (np.zeros((1, 3)), np.zeros((1, 4)), "shapes differ or are empty"),
        (np.zeros((1, 3)), np.zeros((2, 3)), "shapes differ or are empty"),
        (np.zeros((1, 0)), np.zeros((1, 0)), "shapes differ or are empty"),
        (np.zeros(3), np.zeros(3), "shapes differ or are empty"),
        (np.zeros((1, 3)), np.zeros((1, 3), dtype=np.float32), "dtypes differ"),
    ],
)
def test_what_cannot_be_compared_is_an_error(prefill: Array, decode: Array, message: str) -> None:
    with pytest.raises(AlignmentError, match=message):
        measure(prefill, decode)


# ------------------------------------------------------------------------------------------------------------ hashes


@LAW
@given(st.sampled_from(FLOATS + FP8), st.integers(0, 2**32), st.integers(1, 5))
def test_hashes_are_those_of_the_bytes(dtype: np.dtype[np.generic], seed: int, n_rows: int) -> None:
    values = any_bits(dtype, seed, 12 * n_rows).reshape(n_rows, 4, 3)
    assert hash_rows(values) == [hashlib.sha256(row.tobytes()).digest() for row in values]


def test_hashes_of_a_strided_view_are_those_of_its_values() -> None:
    values = np.arange(24.0).reshape(4, 6)[:, ::2]
    assert hash_rows(values) == [hashlib.sha256(np.ascontiguousarray(row).tobytes()).digest() for row in values]


def test_pairs_measured_together_have_the_figures_that_each_has_alone() -> None:
    random = np.random.default_rng(0)
    compared = []
    for n_rows, n_elements, dtype, shift in (
        (1, 96, np.float32, None),
        (3, 96, np.float32, None),
        (2, 96, np.float32, 8),
        (4, 33, np.float64, None),
        (1, 96, np.float64, None),
        (2, 96, ml_dtypes.bfloat16, None),
        (5, 96, np.float32, None),
    ):
        prefill = random.standard_normal((n_rows, n_elements)).astype(dtype)
        decode = (prefill.astype(np.float64) * (1 + 1e-2 * random.standard_normal(prefill.shape))).astype(dtype)
        decode[0] = prefill[0]
        if n_rows > 2:
            decode[1, 5], decode[2] = np.nan, 0.0
        compared.append(Compared(prefill, decode, shift))
    together = measure_all(compared)
    alone = [measure(item.prefill, item.decode, free_shift_of=item.free_shift_of) for item in compared]
    for name in DriftFigures.__dataclass_fields__:
        one_by_one = np.concatenate([getattr(figures, name) for figures in alone])
        np.testing.assert_array_equal(getattr(together, name), one_by_one, strict=True)


# --------------------------------------------------------------------------------------------------------- long rows

LONG = 3 * 65_536 + 77  # more elements than are measured at once, and a rest


@pytest.mark.parametrize("dtype", [np.dtype(np.float64), BF16], ids=str)
def test_a_long_row_is_measured_as_its_blocks_would_be_together(dtype: np.dtype[np.generic]) -> None:
    rng = np.random.default_rng(4)
    prefill = rng.normal(size=(2, LONG)).astype(dtype)
    decode = (prefill.astype(np.float64) * (1.0 + 2.0**-8 * rng.normal(size=(2, LONG)))).astype(dtype)
    found = measure(prefill, decode)
    first, second = prefill.astype(np.float64), decode.astype(np.float64)
    apart, norm = second - first, np.linalg.norm(first, axis=1)
    parts = [measure(prefill[:, at : at + 4096], decode[:, at : at + 4096]) for at in range(0, LONG, 4096)]
    for name, join in (("max_abs", np.maximum), ("max_ulp", np.maximum), ("n_differ", np.add)):
        np.testing.assert_array_equal(getattr(found, name), join.reduce([getattr(part, name) for part in parts]))
    np.testing.assert_array_equal(found.p99_abs, np.sort(np.abs(apart), axis=1)[:, math.ceil(0.99 * LONG) - 1])
    cosine = (first * second).sum(axis=1) / norm / np.linalg.norm(second, axis=1)
    for name, wanted in (
        ("rel_l2", np.linalg.norm(apart, axis=1) / norm),
        ("cosine", cosine),
        ("gain", (apart * first).sum(axis=1) / norm**2),
    ):
        np.testing.assert_allclose(getattr(found, name), wanted, rtol=1e-9, atol=1e-15)
    np.testing.assert_allclose(found.bias, apart.mean(axis=1) / (norm / np.sqrt(LONG)), rtol=1e-9, atol=1e-15)


def test_what_ends_a_long_row_is_not_averaged_away() -> None:
    prefill, decode = np.ones((1, LONG)), np.ones((1, LONG))
    decode[0, 0], decode[0, -1] = 2.0, math.nan
    assert one(measure(prefill, decode), "rel_l2") == math.inf
    decode[0, -1] = 1e200  # the square leaves the range of float64
    assert one(measure(prefill, decode), "rel_l2") == pytest.approx(1e200 / math.sqrt(LONG))
    assert one(measure(np.zeros((1, LONG)), decode), "rel_l2") == math.inf


def test_floats_of_two_signs_are_as_far_apart_as_both_are_from_zero() -> None:
    rng = np.random.default_rng(6)
    for dtype, kind in ((BF16, np.int16), (np.dtype(np.float32), np.int32), (np.dtype(np.float64), np.int64)):
        first, second = rng.normal(size=(2, 8, 65)).astype(dtype)
        top, sides = np.iinfo(kind).max, (first.view(kind).tolist(), second.view(kind).tolist())
        wanted = [
            max(
                abs((a & top) * (1 if a >= 0 else -1) - (b & top) * (1 if b >= 0 else -1))
                for a, b in zip(*row, strict=True)
            )
            for row in zip(*sides, strict=True)
        ]
        np.testing.assert_allclose(measure(first, second).max_ulp, np.array(wanted, dtype=np.float64), rtol=2.0**-50)
