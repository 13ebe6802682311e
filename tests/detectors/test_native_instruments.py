"""The native instruments fire on what rounding cannot do, and stay quiet on what it can."""

import pytest
import torch

import kvdrift
from kvdrift_bench.planted.torch import corpus_for
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
FAULTS = {fault.name: fault for fault in corpus_for(3)}


def native_statistic(fault: str | None) -> float:
    """Return what the fresh-site instrument saw at bfloat16."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    if fault is None:
        audit = kvdrift.audit(model, prompts=PROMPTS, mode="kv_aligned")
    else:
        with FAULTS[fault].plant(model):
            audit = kvdrift.audit(model, prompts=PROMPTS, mode="kv_aligned")
    return next(e.statistic for e in audit.evidence if e.instrument == "native") or 0.0


@pytest.mark.parametrize("fault", ["slot_aliased", "all_scales_1.001", "position_plus_one", "last_key_lost"])
def test_a_fault_is_beyond_rounding_at_the_native_dtype_alone(fault: str) -> None:
    assert native_statistic(fault) > 1.0


def test_rows_that_decode_did_not_write_allow_no_difference_at_all() -> None:
    """A single changed slot is infinitely beyond rounding: its bound is zero."""
    assert native_statistic("slot_aliased") == float("inf")


def test_a_clean_model_stays_far_below_the_bound() -> None:
    assert native_statistic(None) < 0.5
