"""Every clean twin passes: the same function computed in another way is no mismatch."""

from collections.abc import Iterator

import pytest

import kvdrift
from kvdrift.faults import clean_twins
from kvdrift.verdict.model import Verdict
from tests.support.carriers import PROMPTS, carrier_of, one_thread

TWINS = {twin.name: twin for twin in clean_twins()}


# What the audit alarms at today, or cannot decide, and why; each must go on failing until the tool is better.
FALSE_ALARMS = {
    "slots_permuted_for_the_kernel": "scores are compared key by key in the order in which the kernel got the keys",
    "alibi_shifted": "scores are compared as they are, although softmax does not see a constant in a row of them",
}


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", TWINS)
def test_a_clean_twin_passes(name: str, dtype: str, request: pytest.FixtureRequest) -> None:
    reason = FALSE_ALARMS.get(name)
    if reason is not None:
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    twin = TWINS[name]
    _, model = carrier_of(twin, dtype)

    with twin.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.count > 0
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), f"{audit.verdict} at {audit.first_failure}"
