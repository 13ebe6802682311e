"""The gate's own benchmark: what is run is always the same, a fault is red, and figures add up."""

from __future__ import annotations

import pytest

from kvdrift_bench.figures.gate_figures import render_gate
from kvdrift_bench.run.gate_runs import FIREFLY, PEERS, GateRun, clean_trials, fault_trials, measure_gate
from tests.support.matrix import further


def test_runs_are_always_the_same_and_of_every_kind() -> None:
    runs = clean_trials(200)

    assert runs == clean_trials(200)
    assert {run.threads for run in runs} == {1, 2}
    assert {run.attention for run in runs} == {"sdpa", "eager"}
    assert {run.dtype for run in runs} == {"bfloat16", "float16", "float32"}
    assert len({run.model for run in runs}) == 5
    assert len({run.kernel for run in runs}) > 5
    assert 40 < sum(run.batched for run in runs) < 60
    assert not any(run.batched and run.kernel for run in runs)
    faults = fault_trials(40)
    assert len({run.fault for run in faults}) == len(faults) == 40


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["block_stale_once", *further(fault_trials(40)[6].fault)])
def test_a_run_with_a_fault_is_red_and_judged_by_the_peers_too(fault: str) -> None:
    """The first strikes a single step, which must be one that is recorded and not one that chooses a token."""
    (run,) = (run for run in fault_trials(40) if run.fault == fault)

    measure_gate(run)

    assert (run.error, run.is_red, run.right) == (None, True, True)
    assert set(run.peers) == {rule.name for rule in PEERS}


def test_the_figures_count_red_runs_and_name_what_is_wrong() -> None:
    def run(number: int, fault: str | None, verdict: str | None) -> GateRun:
        return GateRun(
            number=number,
            fault=fault,
            model="llama",
            dtype="float32",
            attention="sdpa",
            threads=1,
            kernel=None,
            batched=False,
            verdict=verdict,
            right=None if fault is None else verdict == "MISMATCH",
            peers={"firefly": True},
        )

    runs = [run(0, None, "EXACT"), run(1, None, None), run(0, "late", "MISMATCH"), run(1, "weak", "STRUCTURAL_DRIFT")]
    text = render_gate(runs, [(FIREFLY.name, FIREFLY.formula)], "kvdrift-bench gate")

    assert "| kvdrift gate | any verdict but EXACT and STRUCTURAL_DRIFT | 1 of 2 " in text
    assert "| firefly | max\\|d\\| > max(1e-5, 1e-3 max\\|x\\|) | 2 of 2 " in text
    assert "1 of 2 are red at the tensor where they were planted" in text
    assert "* clean 1 (" in text
    assert "* weak 1 (" in text
    assert "* late" not in text
