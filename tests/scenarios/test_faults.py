"""Every fault that only a scenario can show is found by its scenario, at its address, and not by plain decode."""

from collections.abc import Iterator

import pytest

from kvdrift.scenarios.catalogue import SCENARIOS
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import corpus_for
from tests.support.audits import audited
from tests.support.carriers import N_LAYERS, PROMPT, one_thread
from tests.support.matrix import first_of_each

FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS) if fault.needs is not None}
# kv_aligned goes back one token before it decodes, so plain decode sees that going back is wrong.
FOUND_BY_DECODE = {"rewind_forgets_one", "rewind_takes_two_more"}


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


FAMILIES = {scenario.name: scenario.steps.__module__ for scenario in SCENARIOS}


@pytest.mark.parametrize("name", first_of_each(FAULTS, lambda name: FAMILIES[str(FAULTS[name].needs)]))
def test_a_fault_is_found_by_its_scenario_where_it_was_planted_and_not_by_plain_decode(name: str) -> None:
    fault = FAULTS[name]

    planted = audited(name, scenarios=("decode", str(fault.needs)))

    plain, other = (outcome.judged for outcome in planted.audit.suite.outcomes)
    assert plain is not None
    assert other is not None
    assert (planted.changed or planted.count) > 0
    assert other.verdict is Verdict.MISMATCH, other.decision.reasons
    assert fault.is_at(other.decision.first_failure, planted.model), f"{other.decision.first_failure}, {fault.sites}"
    assert (plain.verdict is Verdict.MISMATCH) == (name in FOUND_BY_DECODE), plain.decision.first_failure


def test_the_prompt_leaves_room_for_every_fault() -> None:
    assert len(PROMPT) >= 8
