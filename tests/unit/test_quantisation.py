"""Honest quantisation by its own definition: half a step, kept ends, rows that wait, float8."""

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from kvdrift.instruments.base import QuantisedRows
from kvdrift.instruments.cacheaudit import SlotTable, judge_slots
from kvdrift.replay.quantisation import FORMATS, RESIDUAL, HonestRows, group_size, quantised_integers, steps_of
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

ROWS = np.random.default_rng(3).normal(size=(1, 2, 9, 16))
INTEGERS = [name for name, form in FORMATS.items() if form.n_bits is not None]


@pytest.mark.parametrize("kind", INTEGERS)
def test_an_honest_value_is_at_most_half_a_step_away(kind: str) -> None:
    n_bits = FORMATS[kind].n_bits or 0

    honest: Any = quantised_integers(ROWS, 16, n_bits)

    step = steps_of(ROWS, 16, n_bits)
    assert np.all(np.abs(honest - ROWS) <= step * (0.5 + 1e-12))
    assert np.abs(honest - ROWS).max() > 0.4 * step.max()
    assert len(np.unique(honest[0, 0, 0])) <= 2**n_bits
    np.testing.assert_allclose(steps_of(honest, 16, n_bits), step, rtol=1e-13)


def test_a_group_of_equal_values_stays_as_it_is() -> None:
    rows = np.full((1, 1, 2, 8), 0.3, dtype=np.float32)

    assert quantised_integers(rows, 8, 4).tobytes() == rows.tobytes()


def test_quantising_twice_changes_no_more_than_rounding() -> None:
    once: Any = quantised_integers(ROWS, 16, 4)

    np.testing.assert_allclose(np.asarray(quantised_integers(once, 16, 4), dtype=np.float64), once, rtol=0, atol=1e-14)


def test_new_rows_are_read_as_they_are_until_enough_have_come() -> None:
    cache = HonestRows(FORMATS["quantised-int4"], 16)

    first = cache.extend(ROWS)
    reads = [cache.extend(ROWS[:, :, :1] + 0.1 * step) for step in range(RESIDUAL + 1)]

    assert first.tobytes() == ROWS.tobytes()
    for step, read in enumerate(reads[:RESIDUAL]):
        assert read.shape[2] == 9 + step + 1
        assert read[:, :, -1].tobytes() == (ROWS[:, :, 0] + 0.1 * step).tobytes()
    assert not np.array_equal(reads[0][:, :, :9], ROWS)
    assert not np.array_equal(reads[-1][:, :, 9:13], reads[-2][:, :, 9:13]), "they were quantised in between"


def test_float8_keeps_one_scale_and_clips_at_it() -> None:
    cache = HonestRows(FORMATS["quantised-fp8"], 16)
    largest = np.abs(ROWS).max()

    cache.extend(ROWS)
    read: Any = cache.extend(4.0 * np.full((1, 2, 1, 16), largest))

    np.testing.assert_allclose(read[:, :, -1], largest, rtol=1e-6)
    relative = np.abs(read[:, :, :9] - ROWS) / np.abs(ROWS)
    assert np.median(relative) < 2.0**-4
    assert np.all(np.abs(read[:, :, :9] - ROWS) <= np.maximum(np.abs(ROWS) * 2.0**-4, largest / 448 * 2.0**-10) * 1.001)


def test_a_group_joins_no_two_rows() -> None:
    assert [group_size(*dims) for dims in ((64,), (128,), (16,), (24, 16), (80,))] == [64, 64, 16, 8, 16]


def recorded(name: str, rows: Array) -> Trace:
    trace = Trace("p", "prefill" if name == "prefill" else "decode", "scenarios", "bfloat16", tuple(range(12)))
    slots = np.arange(rows.shape[2])
    trace.add_cache_read(0, Site.K_CACHE, (10,), slots, np.ascontiguousarray(rows[0].transpose(1, 0, 2)))
    return trace


def judged(read: Array, n_bits: int = 4) -> tuple[int, float]:
    honest = quantised_integers(ROWS.astype(ml_dtypes.bfloat16), 16, n_bits)
    table = SlotTable()
    table.add(
        PassPair(Mode.AS_DESIGNED, recorded("prefill", honest), recorded("decode", read), (10,)),
        {"p": QuantisedRows(f"quantised-int{n_bits}", 9)},
    )
    beyond, evidence = judge_slots(table)
    assert evidence.statistic is not None
    return len(beyond), evidence.statistic


@pytest.mark.parametrize("n_bits", [2, 4])
def test_rows_that_are_honest_in_bfloat16_arithmetic_are_within(n_bits: int) -> None:
    rows = ROWS.astype(ml_dtypes.bfloat16)
    groups = rows.reshape(-1, 16)
    low = groups.min(axis=1, keepdims=True)
    scale = (groups.max(axis=1, keepdims=True) - low) / ml_dtypes.bfloat16(2**n_bits - 1)
    coarse = np.rint((groups - low) / scale) * scale + low

    n_beyond, statistic = judged(coarse.reshape(rows.shape), n_bits)

    assert n_beyond == 0
    assert 0.0 < statistic <= 1.0, "some value fell to the other side, as rounding lets it"


def test_a_value_two_steps_off_is_beyond_honest_quantisation() -> None:
    read = quantised_integers(ROWS.astype(ml_dtypes.bfloat16), 16, 4)
    read[0, 1, 5, 3] += (2.5 * steps_of(ROWS, 16, 4)[0, 1, 5, 3]).astype(ml_dtypes.bfloat16)

    n_beyond, statistic = judged(read)

    assert n_beyond == 1
    assert statistic > 1.0


def test_a_value_that_is_no_number_is_beyond_honest_quantisation() -> None:
    read = quantised_integers(ROWS.astype(ml_dtypes.bfloat16), 16, 4)
    read[0, 0, 0, 0] = np.nan

    assert judged(read) == (1, float("inf"))
