"""A block keeps its columns in the least memory that holds them, and what is read of them has the type that it had."""

from typing import Any

import numpy as np
import pytest

from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import COLUMNS, DriftRow, narrowed
from kvdrift.vocabulary.sites import Site

LIMITS = [-129, -128, -1, 0, 127, 128, -32769, 32767, 32768, -(2**31) - 1, 2**31 - 1, 2**31, -(2**63), 2**63 - 1]


@pytest.mark.parametrize("value", LIMITS)
def test_a_column_of_whole_numbers_keeps_each_value_whatever_its_size(value: int) -> None:
    column = np.array([0, value, 1], dtype=np.int64)

    found = narrowed(column)

    assert found.tolist() == column.tolist()
    assert found.nbytes <= column.nbytes


def test_small_numbers_take_a_byte_and_one_object_for_all_takes_none() -> None:
    names = np.full(1000, "bfloat16", dtype=object)

    assert narrowed(np.zeros(1000, dtype=np.int64)).nbytes == 1000
    assert narrowed(names).strides == (0,)
    assert narrowed(names).tolist() == names.tolist()


def test_objects_that_differ_and_empty_columns_stay_as_they_are() -> None:
    names = np.array(["float32", "bfloat16"], dtype=object)

    assert narrowed(names) is names
    assert narrowed(np.empty(0, dtype=np.int64)).dtype == np.int64
    assert narrowed(np.array([0.5])).dtype == np.float64


def test_sums_of_narrow_columns_do_not_overflow() -> None:
    table = DriftTable.of([_row(100, "p0"), _row(100, "p0"), _row(100, "p1")])
    table.blocks = [
        type(block)(block.mode, block.rung, block.prompt, {name: narrowed(v) for name, v in block.columns.items()})
        for block in table.blocks
    ]
    assert {block.columns["n_elements"].dtype for block in table.blocks} == {np.dtype(np.int8)}

    whole = table.where(lambda _: True)
    for rows in (whole, whole.where(np.array([0, 2])), table.where(lambda block: block.prompt == "p1")):
        for name, kind in COLUMNS.items():
            if kind is not np.void:
                assert getattr(rows, name).dtype == np.dtype(kind), name
    assert (whole.n_elements + whole.n_elements).tolist() == [200, 200, 200]
    assert [row.n_elements for row in whole] == [100, 100, 100]


def _row(n_elements: int, prompt: str) -> DriftRow:
    numbers: dict[str, Any] = dict.fromkeys(("max_abs", "max_ulp", "rel_l2", "p99_abs", "cosine", "bias", "gain"), 0.0)
    counts: dict[str, Any] = dict.fromkeys(
        ("n_differ", "n_nonfinite", "n_lost", "worst_slot", "n_bad_slots", "n_bad_past"), 0
    )
    return DriftRow(
        mode="as_designed",
        rung="bfloat16",
        prompt=prompt,
        token_id=1,
        position=2,
        layer=0,
        site=Site.K_PROJ,
        dtype="bfloat16",
        n_elements=n_elements,
        equal=True,
        sha256_prefill=None,
        sha256_decode=None,
        **numbers,
        **counts,
    )
