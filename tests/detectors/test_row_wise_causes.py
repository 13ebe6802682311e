"""Without a ladder, causes below one rounding are found at their address and named, and harmless changes stay quiet."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_directory
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.models.tiny import tiny_model
from kvdrift_bench.planted.torch import clean_twins, corpus_for
from tests.support.matrix import further

FAULTS = {fault.name: fault for fault in corpus_for(3)}
TWINS = {twin.name: twin for twin in clean_twins()}
PROMPTS: Mapping[str, list[int]] = {
    f"p{n}": np.random.default_rng(n).integers(0, 128, size=length).tolist() for n, length in enumerate((5, 17, 26))
}


def audited(planted: str | None, out: Path | None = None) -> tuple[Audit, bool]:
    """Audit without a ladder; whether the first failure is the true one."""
    model = tiny_model("llama", torch.bfloat16, "sdpa")
    if planted is None:
        return kvdrift.audit(model, prompts=PROMPTS, ladder="off", mode="kv_aligned", out=out), False
    fault = FAULTS.get(planted)
    with (fault or TWINS[planted]).plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, ladder="off", mode="kv_aligned", out=out)
    return audit, fault is not None and fault.is_at(audit.first_failure, model)


@pytest.mark.parametrize(
    ("planted", "size"),
    [
        ("norm_epsilon_x100", 9.9e-5),
        ("rope_base_x1.01", 1e-2),
        ("logits_scaled_1.01", 1e-2),
        ("v_scale_1.001_in_kernel", 1e-3),
    ],
)
def test_a_cause_below_one_rounding_is_found_placed_named_and_sized(planted: str, size: float) -> None:
    audit, is_right = audited(planted)
    assert audit.verdict is Verdict.MISMATCH
    assert is_right, audit.first_failure
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == FAULTS[planted].cause
    sizes = {cause.cause: cause.size for native in audit.decision.natives.values() for cause in native.causes}
    assert sizes[Cause(FAULTS[planted].cause)] == pytest.approx(size, rel=0.1)


def test_a_norm_that_is_computed_in_half_precision_is_found_placed_and_named() -> None:
    """Below one rounding of every element, with a factor of its own in every row."""
    audit, is_right = audited("norm_in_half")

    assert audit.verdict is Verdict.MISMATCH
    assert is_right, audit.first_failure
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "norm_dtype"


@pytest.mark.parametrize(
    ("planted", "cause"),
    [
        ("context_heads_rolled", "product_wrong"),
        *further(("split_sums_of_another_base", "unexplained"), ("activation_approximated", "between_products")),
    ],
)
def test_a_coefficient_that_leaves_more_than_rounding_over_is_no_explanation(planted: str, cause: str) -> None:
    """A gross fault moves the output along many directions, a common factor among them."""
    audit, _ = audited(planted)
    assert audit.verdict is Verdict.MISMATCH
    assert any(found for native in audit.decision.natives.values() for found in native.causes)
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause, "what the products show, and no coefficient"


def test_a_row_that_is_not_stored_as_it_was_computed_is_found_in_the_first_layer() -> None:
    """Keys and values lose their last bits on the way into the cache: less than a rounding, of a copy."""
    audit, is_right = audited("kv_truncated_on_new_rows")
    assert is_right, audit.first_failure


@pytest.mark.parametrize(
    "planted",
    [None, "norms_in_float64", "rope_tables_in_float64", "head_in_two_parts", *further("norms_by_vector_norm")],
)
def test_what_is_computed_in_another_right_way_is_no_mismatch(planted: str | None) -> None:
    audit, _ = audited(planted)
    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), audit.decision.reasons


def test_saved_traces_give_the_same_evidence(tmp_path: Path) -> None:
    audit, _ = audited("rope_base_x1.01", tmp_path / "run")
    again = judge_directory(tmp_path / "run")[0]
    assert again.first_failure == audit.first_failure
    assert again.diagnosis == audit.diagnosis
    first, second = (next(e for e in a.evidence if e.instrument == "directed") for a in (audit, again))
    assert (first.p_value, first.text, first.detail) == (second.p_value, second.text, second.detail)


def test_with_fewer_units_than_alpha_needs_the_directed_tests_abstain() -> None:
    model = tiny_model("llama", torch.bfloat16, "sdpa")
    audit = kvdrift.audit(model, prompts={"p": PROMPTS["p1"]}, ladder="off", mode="kv_aligned")
    directed = next(e for e in audit.evidence if e.instrument == "directed")
    assert not directed.valid
    assert directed.reason is not None
    assert "4 distinct (prompt, position) units" in directed.reason
