"""Scenarios with one layer at a time at higher precision: what the whole model at that precision gives, bit by bit."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import kvdrift
from kvdrift.pairing.drift import DriftTable
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.planted.torch import corpus_for
from tests.support.carriers import N_LAYERS, PROMPTS, carrier_of, one_thread
from tests.support.matrix import further
from tests.support.tiny import tiny_model

FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS) if fault.needs is not None}
SCENARIOS = ["chunked_prefill", *further("rewind", "batch_padded")]


@pytest.fixture(autouse=True)
def single_thread() -> Iterator[None]:
    with one_thread():
        yield


def audited(model: torch.nn.Module, ladder: LadderChoice, scenario: str, out: Path) -> tuple[Audit, list[str]]:
    """The audit and its drift table, row by row; as text, in which a NaN equals itself."""
    audit = kvdrift.audit(model, prompts=PROMPTS, span=3, scenarios=[scenario], ladder=ladder, out=out / ladder)
    return audit, [repr(row) for row in DriftTable.read(out / ladder / "drift.parquet")]


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize(
    "architecture", ["llama", *(pytest.param(a, marks=pytest.mark.matrix) for a in ("gemma2", "mixtral"))]
)
def test_a_scenario_gives_the_same_table_by_layer_as_by_model(architecture: str, scenario: str, tmp_path: Path) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16, lively=True)

    whole, rows = audited(model, "model", scenario, tmp_path)
    by_layer, layer_rows = audited(model, "layer", scenario, tmp_path)

    assert len({row.split("rung=")[1].split(",")[0] for row in rows}) == 2
    assert layer_rows == rows
    assert (by_layer.verdict, by_layer.kind, by_layer.caveats) == (whole.verdict, whole.kind, whole.caveats)
    assert by_layer.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), by_layer.view["reasons"]


@pytest.mark.parametrize(
    "name", ["rewind_leaves_a_draft_row", *further("positions_ignore_padding", "history_lost_at_verify")]
)
def test_a_fault_that_a_scenario_shows_is_found_by_layer_where_it_was_planted(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    _, model = carrier_of(fault)
    found = []
    for ladder in ("model", "layer"):
        with fault.plant(model) as commits:
            found.append(audited(model, ladder, str(fault.needs), tmp_path))
        assert commits.changed or commits.count

    (whole, rows), (by_layer, layer_rows) = found
    assert by_layer.verdict is Verdict.MISMATCH, by_layer.view["reasons"]
    assert fault.is_at(by_layer.first_failure, model), f"{by_layer.first_failure}, planted at {fault.sites}"
    assert (by_layer.first_failure, by_layer.kind) == (whole.first_failure, whole.kind)
    assert layer_rows == rows
