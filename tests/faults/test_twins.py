"""Every clean twin passes: the same function computed in another way is not a mismatch."""

from collections.abc import Iterator

import pytest

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import clean_twins
from tests.support.carriers import PROMPTS, carrier_of, one_thread

TWINS = {twin.name: twin for twin in clean_twins()}


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.matrix)])
@pytest.mark.parametrize("name", TWINS)
def test_a_clean_twin_passes(name: str, dtype: str) -> None:
    twin = TWINS[name]
    _, model = carrier_of(twin, dtype)

    with twin.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.count > 0
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), f"{audit.verdict} at {audit.first_failure}"
