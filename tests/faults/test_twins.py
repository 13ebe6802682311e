"""Every clean twin passes: the same function computed in another way is not a mismatch."""

from collections.abc import Iterator

import pytest

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import clean_twins
from tests.support.carriers import PROMPTS, carrier_of, one_thread
from tests.support.matrix import further

TWINS = {twin.name: twin for twin in clean_twins()}
# One for each part of a layer, and for each way to say the same there.
CORE = (
    "own_attention",
    "two_splits",
    "slots_permuted",
    "query_doubled_scale_halved",
    "scores_shifted",
    "kv_heads_repeated",
    "strided_views",
    "padding_of_garbage",
    "products_in_two_parts",
    "rows_beside_others",
    "norms_in_float64",
    "rope_tables_in_float64",
    "mlp_width_in_parts",
    "all_positions_shifted",
)


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in CORE), *further(*((name, "bfloat16") for name in TWINS))],
)
def test_a_clean_twin_passes(name: str, dtype: str) -> None:
    twin = TWINS[name]
    _, model = carrier_of(twin, dtype)

    with twin.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.count > 0
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), f"{audit.verdict} at {audit.first_failure}"
