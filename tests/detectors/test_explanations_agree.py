"""What is said of a mismatch fits together: the mode that explains it best, the slot of its address, its shape."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch.nn.functional as F

import kvdrift
from kvdrift.report.markdown import render_markdown
from kvdrift.report.view import build_view
from kvdrift.trace.model import CacheRecord, Trace
from kvdrift.verdict.judge import decide_route, judge
from kvdrift.vocabulary.sites import Site
from tests.support.attention import attending
from tests.support.traces import change, synthetic_run, touches

IDS = [(37 * i + 11) % 90 + 3 for i in range(40)]


@pytest.fixture
def blind_to_masks() -> Iterator[Any]:
    """A tiny model of which single tokens attend to all that the cache hands out."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any = None, scaling: Any = None, **_: Any) -> Any:
        mask = None if query.shape[2] == 1 else mask
        causal = mask is None and query.shape[2] > 1
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scaling, enable_gqa=True, is_causal=causal
        )
        return out.transpose(1, 2).contiguous(), None

    with attending(attend, "no_mask_at_decode") as model:
        yield model


def test_slots_behind_the_token_are_named_in_the_mode_that_explains_most(blind_to_masks: Any) -> None:
    """In kv_aligned the slots behind the token hold what a rewind left there, and not only zeros."""
    audit = kvdrift.audit(blind_to_masks, prompts={"short": IDS[:5], "long": IDS[3:24]}, span=4, cache="static")

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "unwritten_slots_read", audit.diagnosis
    assert audit.view["modes"]["as_designed"]["status"] == "FAIL"
    assert "slots behind its own key" in audit.diagnosis.text
    assert audit.diagnosis.explained > 0.9999


def test_values_of_a_scenario_alone_are_kept_once_its_noise_is_known(blind_to_masks: Any) -> None:
    """Plain decode did not run, so that nothing can be beyond rounding before the scenario was perturbed itself."""
    audit = kvdrift.audit(blind_to_masks, prompts={"long": IDS[3:14]}, span=2, scenarios=["static_cache"])

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "unwritten_slots_read"
    assert audit.diagnosis.explained > 0.9999


def _without_two_slots(trace: Trace) -> None:
    """Let every decode step of layer 1 read no rows of the slots 3 and 4."""
    if trace.pass_name != "decode" or trace.prompt != "p6_len_16" or trace.label == "control":
        return
    reads = []
    for read in trace.cache_reads():
        keep = [i for i, slot in enumerate(read.slots) if read.layer != 1 or slot not in (3, 4)]
        stored = np.arange(len(keep))
        reads.append(CacheRecord(read.layer, read.site, read.positions, read.slots[keep], stored, read.rows[keep]))
    trace.cache[:] = reads


def test_an_address_names_a_slot_that_the_cause_is_about() -> None:
    """Of rows that decode lacks none drifts: the one that drifts most is a healthy one, and rounding makes it drift."""
    run = synthetic_run(after=[_without_two_slots])
    decision, judged = decide_route(run), judge(run)

    assert judged.diagnosis is not None
    assert judged.diagnosis.cause == "key_lost_middle", judged.diagnosis
    assert judged.diagnosis.slots == (3, 4)
    assert decision.first_slot not in (3, 4)
    assert judged.decision.first_slot == 3
    assert "slot 3" in build_view(judged)["first_failure"]["text"]


def test_an_unexplained_error_is_reported_with_its_shape() -> None:
    def worse(values: Any) -> Any:
        values = values.copy()
        values[4:8] += [1.0, -2.0, 3.0, 0.5]
        values[4:8] *= 1.0 + 0.3 * values[4:8]
        return values

    judged = judge(synthetic_run(edits=[change(touches(Site.MLP_OUT, layer=1), worse)]))
    view = build_view(judged)

    assert judged.diagnosis is not None
    assert judged.diagnosis.cause == "unexplained"
    assert judged.diagnosis.shape is not None
    assert judged.diagnosis.shape.elements == (4, 7)
    assert view["diagnosis"]["shape"]["extent"] == "block"
    assert "Shape of the error: the error is in elements 4 to 7 of 16, one block of 4;" in render_markdown(view)


def test_an_explained_error_has_no_shape() -> None:
    judged = judge(synthetic_run(edits=[change(touches(Site.MLP_OUT, layer=1), lambda values: 2.0 * values)]))

    assert judged.diagnosis is not None
    assert judged.diagnosis.cause == "scaled"
    assert judged.diagnosis.shape is None
