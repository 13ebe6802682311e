"""One bad slot stands out from thousands; layers that drift much by themselves do not alarm."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from kvdrift.instruments.cacheaudit import SlotTable, judge_slots
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import Site

N_SLOTS, HEADS, DIM = 2048, 4, 16
TOKENS = tuple(range(N_SLOTS))
Floats = NDArray[np.float64]


def pair(
    edit: Callable[[Floats], None], noise: float = 0.01, n_slots: int = N_SLOTS, rung: str = "float32"
) -> PassPair:
    rng = np.random.default_rng(5)
    rows = rng.standard_normal((n_slots, HEADS, DIM))
    # The first row is nearly zero in one head, as values of a first token may be.
    rows[0, 2] *= 1e-6
    spread = np.exp(0.7 * rng.standard_normal((n_slots, 1, 1)))
    decode = rows + noise * spread * rng.standard_normal(rows.shape)
    edit(decode)
    sides = (
        Trace("p", "prefill", "full", rung, TOKENS[:n_slots]),
        Trace("p", "decode", "full", rung, TOKENS[:n_slots]),
    )
    for trace, values in zip(sides, (rows, decode), strict=True):
        slots = np.arange(n_slots, dtype=np.int64)
        trace.add_cache_read(3, Site.V_CACHE, (n_slots - 1,), slots, values.astype(np.float32))
    return PassPair(Mode.AS_DESIGNED, *sides, (n_slots - 1,))


def judged(edit: Callable[[Floats], None], **options: object) -> tuple[list[object], object]:
    table = SlotTable()
    table.add(pair(edit, **options))  # type: ignore[arg-type]
    keys, evidence = judge_slots(table)
    return list(keys), evidence


def nothing(rows: Floats) -> None:
    pass


def stale(rows: Floats) -> None:
    rows[777, 1] = np.random.default_rng(9).standard_normal(DIM)


def test_one_head_of_one_slot_among_thousands_is_found() -> None:
    keys, evidence = judged(stale)
    assert keys == [Address("p", N_SLOTS - 1, 3, Site.V_CACHE)]
    assert (evidence.detail["slot"], evidence.detail["head"]) == (777, 1)  # type: ignore[attr-defined]
    assert evidence.supports == "H1"  # type: ignore[attr-defined]


@pytest.mark.parametrize("noise", [0.0, 1e-6, 1e-3, 0.01, 0.05, 0.3])
def test_rows_that_all_drift_alike_do_not_alarm(noise: float) -> None:
    keys, evidence = judged(nothing, noise=noise)
    assert keys == []
    assert evidence.supports == "H0"  # type: ignore[attr-defined]


def test_a_row_that_is_no_number_is_found() -> None:
    def broken(rows: Floats) -> None:
        rows[5, 0, 3] = np.nan

    assert judged(broken)[0] != []


def test_a_few_slots_have_no_median_to_stand_out_from() -> None:
    keys, evidence = judged(nothing, n_slots=7)
    assert keys == []
    assert not evidence.valid  # type: ignore[attr-defined]
    assert "8 slots" in evidence.reason  # type: ignore[attr-defined]


def test_where_the_layer_drifts_much_a_stale_row_is_not_claimed() -> None:
    """The bound grows with the median, and the evidence says how far."""
    keys, evidence = judged(stale, noise=0.3)
    assert keys == []
    assert evidence.minimum_detectable > 1.0  # type: ignore[attr-defined]
