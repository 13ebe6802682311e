"""Every fault that only a scenario can show is found by its scenario, at its address, and not by plain decode."""

from collections.abc import Iterator
from typing import Any

import pytest

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.planted.torch import Fault, corpus_for
from tests.support.carriers import N_LAYERS, PROMPT, PROMPTS, carrier_of, one_thread

FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS) if fault.needs is not None}
# kv_aligned goes back one token before it decodes, so plain decode sees that going back is wrong.
FOUND_BY_DECODE = {"rewind_forgets_one", "rewind_takes_two_more"}


@pytest.fixture(autouse=True, scope="module")
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def audited(fault: Fault, model: Any, scenarios: list[str]) -> tuple[Audit, int]:
    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3, scenarios=scenarios)
    return audit, commits.changed or commits.count


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found_by_its_scenario_where_it_was_planted(name: str) -> None:
    fault = FAULTS[name]
    _, model = carrier_of(fault)

    audit, n_commits = audited(fault, model, [str(fault.needs)])

    assert n_commits > 0
    assert audit.verdict is Verdict.MISMATCH, audit.view["reasons"]
    assert fault.is_at(audit.first_failure, model), f"{audit.first_failure}, planted at {fault.sites}"


@pytest.mark.parametrize("name", FAULTS)
def test_plain_decode_does_not_find_it(name: str) -> None:
    fault = FAULTS[name]

    audit, _ = audited(fault, carrier_of(fault)[1], ["decode"])

    assert (audit.verdict is Verdict.MISMATCH) == (name in FOUND_BY_DECODE), audit.first_failure


def test_the_prompt_leaves_room_for_every_fault() -> None:
    assert len(PROMPT) >= 8
