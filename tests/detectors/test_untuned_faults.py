"""How many faults of decode steps are explained that the catalogue was not made for, and the shape of the others."""

from __future__ import annotations

from functools import cache

import pytest

import kvdrift
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.shapes import Relation
from tests.support.untuned import FAULTS, model_for

pytestmark = pytest.mark.xdist_group("untuned")

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
# Which of them are no part of the matrix: one of each family.
CORE = ("split_never_merged", "one_head_scaled", "norm_of_the_layer_input", "repetition_penalty_left_in")
# What would have to be known of them is in no trace: weights, or what lies inside a module. Exact products tell where
# some of them lie.
SHAPED = {
    "last_tile_of_the_head_wraps": ("tail", Relation.NONE),
    "accumulator_not_rescaled": ("all", Relation.NONE),
    "gate_and_up_exchanged": ("all", Relation.NONE),
    "half_of_the_width_not_summed": ("all", Relation.NONE),
    "half_of_the_heads_not_summed": ("all", Relation.NONE),
    "activations_in_fp8": ("all", Relation.NONE),
}


@cache
def _explained(name: str) -> Diagnosis:
    fault = FAULTS[name]
    model = model_for(fault)
    with fault.plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=4)
    assert commits.changed > 0
    assert audit.verdict is kvdrift.Verdict.MISMATCH, name
    assert audit.diagnosis is not None
    return audit.diagnosis


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CORE else [pytest.mark.matrix]) for name in FAULTS]
)
def test_a_fault_is_called_by_its_name_or_by_its_shape(name: str) -> None:
    diagnosis = _explained(name)

    assert diagnosis.cause in FAULTS[name].right, diagnosis
    if name in SHAPED:
        assert diagnosis.shape is not None
        assert (diagnosis.shape.extent, diagnosis.shape.relation) == SHAPED[name]
    else:
        assert diagnosis.shape is None


def test_an_error_in_all_elements_is_told_where_rounding_hides_most_of_them() -> None:
    """At the native dtype alone two in three of the elements differ by no more than rounding may make of them."""
    fault = FAULTS["activations_in_fp8"]
    model = model_for(fault)
    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=4, ladder="off", mode="kv_aligned")
    assert audit.diagnosis is not None
    shape = audit.diagnosis.shape
    assert shape is not None
    assert (shape.extent, shape.elements) == ("all", None)
    assert "in all 64 elements, of which rounding hides it in" in shape.text


@pytest.mark.parametrize(
    ("name", "place", "by"),
    [("values_mapped_by_tile", (0, "attn_ctx"), "replay"), ("new_key_in_two_slots", (0, "k_cache"), "cache")],
)
def test_what_an_instrument_finds_by_itself_is_explained(name: str, place: tuple[int, str], by: str) -> None:
    """Inputs differ as designed, so without a ladder only attention and the cache are judged."""
    fault = FAULTS[name]
    model = model_for(fault)
    with fault.plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder="off", mode="as_designed")

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert {item.instrument for item in audit.evidence if item.supports == "H1"} >= {by}
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == place  # type: ignore[union-attr]
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause in fault.right, audit.diagnosis


@pytest.mark.matrix
def test_at_most_one_in_four_is_unexplained_in_either_half() -> None:
    for is_seen in (True, False):
        names = [name for name, fault in FAULTS.items() if fault.is_seen == is_seen]
        assert len(names) >= 24
        assert sum(_explained(name).cause == "unexplained" for name in names) <= len(names) / 4


def test_what_has_a_shape_is_planted() -> None:
    assert set(SHAPED) <= set(FAULTS)
