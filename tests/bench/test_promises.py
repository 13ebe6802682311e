"""Faults of 1.5 times a stated minimum are found at their place, and ones far below it are not claimed."""

import pytest

from kvdrift_bench.run import promise_runs
from kvdrift_bench.run.promise_runs import run_promises, table


@pytest.mark.parametrize(
    ("place", "shape"), [("mlp_out", "all at random"), ("attn_ctx", "a common factor"), ("logits", "one element")]
)
def test_a_fault_above_the_minimum_is_found(place: str, shape: str) -> None:
    (cell,) = run_promises([place], [shape], 1)
    assert 0.0 < cell.minimum < 0.05
    assert (cell.found, cell.trials) == (1, 1)
    assert f"| `{place}` | {shape} |" in table([cell])


def test_a_fault_far_below_the_minimum_counts_as_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promise_runs, "TIMES", 0.01)
    (cell,) = run_promises(["mlp_out"], ["all at random"], 1)
    assert cell.found == 0
