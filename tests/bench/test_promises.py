"""Faults of 1.5 times a stated minimum are found at their place, and ones far below it are not claimed."""

from dataclasses import replace

import pytest

from kvdrift_bench.run import promise_records, promise_runs
from kvdrift_bench.run.promise_records import INSTRUMENTS, run_recorded
from kvdrift_bench.run.promise_runs import run_promises
from kvdrift_bench.run.promise_shapes import SHAPES, PromiseCell, table


@pytest.mark.parametrize(
    ("place", "shape"), [("mlp_out", "all at random"), ("attn_ctx", "a common factor"), ("logits", "one element")]
)
def test_a_fault_above_the_minimum_is_found(place: str, shape: str) -> None:
    (cell,) = run_promises([place], [shape], 1)
    assert 0.0 < cell.minimum < 0.05
    assert (cell.found, cell.trials) == (1, 1)
    assert f"| `{place}` | {cell.minimum:.2%} | " in table([cell])
    assert "1 of 1" in table([cell])


def test_a_fault_far_below_the_minimum_counts_as_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(promise_runs, "TIMES", 0.01)
    (cell,) = run_promises(["mlp_out"], ["all at random"], 1)
    assert cell.found == 0


def test_a_fault_put_into_recorded_values_is_judged_as_in_an_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The cheapest of the instruments; at the size of nothing none of its faults is found."""
    cells = list(run_recorded(["cache"], 1, "bfloat16"))
    assert [cell.found for cell in cells] == [1] * (2 * len(SHAPES))
    monkeypatch.setattr(promise_records, "TIMES", 0.01)
    assert [cell.found for cell in run_recorded(["cache"], 1, "bfloat16")] == [0] * (2 * len(SHAPES))
    assert "cache" in INSTRUMENTS


@pytest.mark.parametrize("instrument", INSTRUMENTS)
def test_every_instrument_can_be_tried_on_what_was_recorded(instrument: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One place and shape of each: what an instrument holds of a recorded pass, and whom it asks, changes with it."""
    few = [replace(each, sites=each.sites[:1], shapes=each.shapes[:1]) for each in promise_records.PROMISES]
    monkeypatch.setattr(promise_records, "PROMISES", tuple(few))

    cells = list(run_recorded([instrument], 1, "bfloat16"))

    assert cells
    assert all(cell.is_kept for cell in cells)


def test_a_promise_needs_nearly_all_and_something_tried() -> None:
    assert PromiseCell("x", "y", 0.1, 19, 20).is_kept
    assert not PromiseCell("x", "y", 0.1, 18, 20).is_kept
    assert not PromiseCell("x", "y", 0.1, 0, 0).is_kept
