"""The cause of a planted fault is named, with its parameters; what is in no catalogue is unexplained, not misnamed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import kvdrift
from kvdrift.capture.modes import capture_prompt, continue_greedily
from kvdrift.diagnosis.diagnose import diagnose
from kvdrift.diagnosis.storage import explain_storage
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.measure.measured import Measured
from kvdrift.pipeline.judge import judge_directory
from kvdrift.verdict.judge import decide_route
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift.zoo.build import build
from kvdrift_bench.planted.torch import corpus_for
from tests.support.audits import audited
from tests.support.matrix import first_of_each, further
from tests.support.tiny import tiny_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
N_LAYERS = 3
FAULTS = {fault.name: fault for fault in corpus_for(N_LAYERS)}

# Architecture, fault, cause, and what the text must tell.
NAMED = [
    ("llama", "position_plus_one", "rope_position_offset", "as if at position 12 instead of 11"),
    ("llama", "q_position_plus_one", "rope_position_offset_q", "12 instead of 11"),
    ("llama", "k_position_plus_one", "rope_position_offset_k", "12 instead of 11"),
    ("llama", "rope_base_x10", "rope_base", "another base or table"),
    ("llama", "rope_linear_scaling_of_4", "rope_scaling", "0.25"),
    ("llama", "rope_attention_factor_1.02", "rope_attention_factor", "1.02"),
    ("llama", "rope_tables_bf16", "rope_tables_rounded", "bfloat16"),
    ("llama", "rope_slowest_pair_lost", "rope_pair_lost", "[7]"),
    ("llama", "rope_on_half_of_the_dims", "rope_partial_dims", "[4, 5, 6, 7]"),
    ("llama", "rope_interleaved", "rope_interleaved", "neighbours"),
    ("llama", "k_stored_unrotated", "rope_missing_on_k", "does not rotate its key"),
    ("llama", "k_rotated_twice", "rope_twice_on_k", "twice"),
    ("llama", "all_scales_1.001", "score_scale", "1.001"),
    ("llama", "one_layer_scale_1.01", "score_scale", "1.01"),
    ("llama", "one_head_scale_1.016", "score_scale_head", "[1]"),
    ("gemma2", "softcap_missing", "softcap_missing", "does not cap"),
    ("gpt_oss", "sink_missing", "sink_missing", "sink"),
    ("gpt_oss", "sink_doubled", "sink_doubled", "sink"),
    ("llama", "first_key_lost", "key_lost_first", "first 1"),
    ("llama", "last_key_lost", "key_lost_last", "own token"),
    ("llama", "some_key_lost", "key_lost_middle", "does not attend to the keys"),
    ("llama", "mask_top_left", "mask_top_left", "last 11 keys"),
    ("llama", "last_tile_dropped", "key_tile_lost", "last 4 keys"),
    ("llama", "heads_tiled", "heads_tiled", "by tile"),
    ("llama", "last_head_reads_first_group", "head_group_wrong", "query head 3 reads kv head 0 instead of 1"),
    ("llama", "group_of_eight_assumed", "group_size_wrong", "instead of 2"),
    ("llama", "splits_normalised_apart", "chunk_merge", "added without their softmax weights"),
    ("llama", "slot_aliased", "slot_aliased", "slot 5 holds the K of slot 4"),
    ("llama", "slot_zero", "slot_zero", "slots 5 hold zeros"),
    ("llama", "slot_stale", "slot_stale", "stale"),
    ("llama", "torn_row", "slot_half_stale", "only part of the rows"),
    ("llama", "value_slots_exchanged", "v_permuted", "slots 2 and 6 hold each other's V"),
    ("llama", "keys_read_as_values", "k_read_as_v", "other half of the cache"),
    ("llama", "v_scale_0.9", "v_scale", "0.9"),
    ("llama", "k_scale_lost_on_all_rows", "k_scale_lost", "0.125"),
    ("llama", "k_tail_dims_zero", "k_tail_dims_lost", "are zero"),
    ("llama", "kv_fp8", "kv_rounded_fp8", "float8_e4m3fn"),
    ("llama", "kv_fp16", "kv_rounded_fp16", "float16"),
    ("llama", "kv_bf16", "kv_rounded_bf16", "bfloat16"),
    ("llama", "position_zero", "rope_position_offset", "as if at position 0 instead of 11"),
    ("llama", "rope_long_factor_switch", "rope_scaling", "0.5"),
    ("llama", "rope_base_x1.01", "rope_base", "1.01 times the base"),
    ("llama", "rope_frequencies_bf16", "rope_frequencies_rounded", "frequencies to bfloat16"),
    ("gpt_oss", "position_plus_one", "rope_position_offset", "12 instead of 11"),
    ("gpt_oss", "k_rotated_twice", "rope_twice_on_k", "twice"),
    ("gpt_oss", "last_key_lost", "key_lost_last", "own token"),
    ("gpt_oss", "splits_normalised_apart", "chunk_merge", "without their softmax weights"),
    ("gpt_oss", "all_scales_1.001", "score_scale", "1.001"),
    ("phi3", "fused_projection_split_wrong", "qkv_split_wrong", "v_proj in the place of k_proj"),
    ("qwen3", "q_norm_skipped", "q_norm_missing", "q_proj unchanged as q_norm"),
    ("gemma2", "embedding_scale_lost", "embedding_scale", "0.125"),
    ("gemma2", "softcap_too_small", "softcap_wrong", "2.5 instead of 5"),
    ("gemma2", "all_scales_1.001", "score_scale", "1.001"),
    ("gemma2", "one_head_scale_1.016", "score_scale_head", "[1]"),
    ("gemma2", "window_minus_one", "window_off_by_one", "shorter by 1"),
    ("gemma2", "window_plus_one", "window_off_by_one", "which has left the window"),
    ("gemma2", "window_on_every_layer", "window_wrong_layer", "the window of other layers"),
    ("gemma2", "slot_aliased", "slot_aliased", "slot 9 holds the K of slot 8"),
    ("llama", "unwritten_slots_read", "unwritten_slots_read", "2 slots behind its own key"),
    ("llama", "graph_kv_len_frozen", "kv_len_frozen", "at every step"),
    ("llama", "query_strides_ignored", "q_layout", "heads and dims exchanged"),
    ("llama", "split_peaks_forgotten", "chunk_merge", "largest scores"),
    ("llama", "split_sums_of_another_base", "chunk_merge", "base 2"),
    ("llama", "draft_token_in_current_slot", "slot_stale", "slots 11 hold K rows"),
    ("llama", "prefix_of_other_weights", "prefix_stale", "0, 1, 2, 3"),
    ("llama", "cache_of_the_layer_below", "kv_of_other_layer", "rows of layer 1"),
    ("llama", "donor_overwritten", "kv_of_other_layer", "rows of layer 2"),
    ("llama", "values_transposed", "v_transposed", "heads and slots exchanged"),
    ("llama", "values_rolled", "v_permuted", "slot 1 holds the V of slot 0"),
    ("llama", "kv_heads_written_alike", "head_group_wrong", "[0, 0]"),
    ("llama", "rows_never_copied", "slot_zero", "hold zeros"),
    ("llama", "kv_int4", "kv_rounded_int4", "one scale for each channel"),
    ("llama", "k_codes_of_two_bits", "kv_codes_cut", "2 bits are read"),
    ("llama", "kv_bits_reinterpreted", "kv_bits_reinterpreted", "stored as bfloat16 and read as float16"),
    ("llama", "norm_epsilon_x10", "norm_epsilon", "larger by"),
    ("llama", "norm_epsilon_x0.1", "norm_epsilon", "smaller by"),
    ("llama", "norm_inverse_in_bf16", "norm_dtype", "inverse root to bfloat16"),
    ("llama", "norm_weight_plus_one", "norm_weight_offset", "one is added to the weight"),
    ("llama", "final_norm_skipped", "final_norm_missing", "unchanged as final_norm_out"),
    ("gemma2", "logit_softcap_missing", "logit_softcap_missing", "caps them at 30"),
    ("llama", "logits_scaled_1.01", "logit_scale", "1.01"),
    # Several products lie in front of the query, and nothing shows what is rotated.
    ("deepseek_v3", "position_plus_one", "rope_position_offset", "1 further on where the first pair turns by a radian"),
    ("deepseek_v3", "position_zero", "rope_position_offset", "as if at position 0"),
    ("deepseek_v3", "graph_position_frozen", "rope_position_offset", "as if its position stood still at"),
    ("deepseek_v3", "rope_base_x1.01", "rope_angles", "off in proportion to the position"),
    ("deepseek_v3", "kv_fp8", "kv_rounded_fp8", "told from the last 8 elements, which all heads share"),
    ("deepseek_v3", "kv_int4", "kv_rounded_int4", "told from the last 8 elements, which all heads share"),
    (
        "phi",
        "rope_attention_factor_1.02",
        "rope_attention_factor",
        "elements of each head of its query that it rotates",
    ),
]

# Faults of which no trace holds what a diagnosis would need: exact products tell where they lie.
BY_PRODUCTS = [
    ("llama", "activation_approximated", "between_products", "the 3 products of mlp_out are right in both passes"),
    ("llama", "context_heads_rolled", "product_wrong", "decode's attn_out is not what self_attn.o_proj gives"),
    ("mixtral", "second_expert_dropped", "expert_weights", "the router and the experts are right in both passes"),
    ("mixtral", "expert_weights_unnormalised", "expert_weights", "other experts are taken in one of them"),
]

# Where decode is right at the upper rungs or the values are judged at bfloat16 alone: causes that must be told through
# rounding.
AT_NATIVE = [
    ("llama", "position_plus_one", "rope_position_offset"),
    ("llama", "q_position_advanced_by_donor", "rope_position_offset_q"),
    ("llama", "rope_base_x10", "rope_base"),
    ("llama", "rope_linear_scaling_of_4", "rope_scaling"),
    ("llama", "rope_interleaved", "rope_interleaved"),
    ("llama", "rope_on_half_of_the_dims", "rope_partial_dims"),
    ("llama", "k_rotated_twice", "rope_twice_on_k"),
    ("llama", "k_stored_unrotated", "rope_missing_on_k"),
    ("llama", "slot_stale", "slot_stale"),
    ("llama", "values_transposed", "v_transposed"),
    ("llama", "kv_int4", "kv_rounded_int4"),
    ("llama", "norm_weight_plus_one", "norm_weight_offset"),
    ("llama", "context_heads_rolled", "unexplained"),
]

# Two names for the same values: each is named with the other as its equal.
EQUALS = [
    ("llama", "ghost_split", {"v_scale", "ghost_chunk"}),
    ("gemma2", "first_key_lost", {"window_off_by_one", "key_lost_first"}),
]


@pytest.mark.parametrize(
    ("architecture", "name", "cause", "told"),
    first_of_each(NAMED, lambda row: row[2].split("_")[0]),  # a family of causes: of rope, of norm, of kv rows
    ids=lambda value: str(value)[:24],
)
def test_the_cause_is_named_with_its_parameters(architecture: str, name: str, cause: str, told: str) -> None:
    planted = audited(name, architecture, "bfloat16")

    diagnosis = planted.audit.diagnosis
    assert planted.count > 0
    assert planted.is_at(name), planted.audit.first_failure
    assert diagnosis is not None
    assert diagnosis.cause == cause, diagnosis
    assert told in diagnosis.text
    assert 0.999 <= diagnosis.explained <= 1.0


@pytest.mark.parametrize(
    ("name", "cause"),
    [("some_key_lost", "key_lost_middle"), *further(("last_tile_dropped", "key_tile_lost"))],
)
def test_a_cause_is_tried_where_there_are_keys_enough(name: str, cause: str) -> None:
    """At the first failure there are two keys, and all of their losses look alike."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    with FAULTS[name].plant(model):
        audit = kvdrift.audit(model, prompts={"short": [7, 3], **PROMPTS}, span=3)

    assert audit.first_failure is not None
    assert audit.first_failure.prompt == "short"
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause
    assert "tried on" in audit.diagnosis.text


def test_a_row_of_zeros_is_not_taken_for_one_that_was_rounded() -> None:
    """Beside a large row the points of a coarse grid lie so far apart that zero is the nearest."""
    rows = np.random.default_rng(3).normal(size=(6, 2, 4))
    rows[0] *= 100.0
    read = rows.copy()
    read[3] = 0.0

    found = explain_storage("key", rows, read, np.array([3]), "bfloat16")

    assert not [candidate for candidate in found if candidate.explained > 0.999]


@pytest.mark.parametrize(("architecture", "name", "cause", "text"), first_of_each(BY_PRODUCTS, lambda row: row[0]))
def test_what_no_trace_holds_is_told_by_the_products_around_it(
    architecture: str, name: str, cause: str, text: str
) -> None:
    options: dict[str, Any] = {"experts_implementation": "eager"} if architecture == "mixtral" else {}
    model = tiny_model(architecture, dtype=torch.bfloat16, **options)

    with FAULTS[name].plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause
    assert text in audit.diagnosis.text
    assert audit.diagnosis.shape is not None, "the shape of the error is told as well"
    assert audit.diagnosis.explained == 0.0, "no share was measured"
    for report in (audit.to_markdown(), audit.to_html()):
        assert "% of the difference." not in report
        assert "(explains" not in report
    assert f"Shape of the error: {audit.diagnosis.shape.text}" in audit.to_markdown()
    assert FAULTS[name].is_cause("unexplained") is None
    assert FAULTS[name].is_cause(cause) is True


@pytest.mark.parametrize(("architecture", "name", "cause"), first_of_each(AT_NATIVE, lambda row: row[2].split("_")[0]))
def test_the_cause_is_told_through_rounding(architecture: str, name: str, cause: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)

    with FAULTS[name].plant(model), HFEngine(model) as engine:
        tokens = tuple(PROMPTS["p"])
        prompt = Prompt("p", tokens, continue_greedily(engine, tokens, 3))
        run = Measured(AuditPlan(span=3), engine.info, [prompt], created="")
        for item in capture_prompt(engine, prompt, run.modes, "bfloat16"):
            run.add(item)

    suspect = run.suspects.kept["kv_aligned", "bfloat16"]
    assert FAULTS[name].is_at(suspect.address, model)
    assert diagnose(suspect).diagnosis.cause == cause


@pytest.mark.parametrize(("architecture", "name", "causes"), EQUALS)
def test_causes_that_are_the_same_here_are_named_as_equals(architecture: str, name: str, causes: set[str]) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)

    with FAULTS[name].plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3)

    found = audit.view["diagnosis"]
    equals = {c["cause"] for c in found["runners_up"] if abs(c["explained"] - found["explained"]) < 1e-5}
    assert found["cause"] in causes
    assert causes <= {found["cause"], *equals}
    assert all(FAULTS[name].is_cause(cause) for cause in causes)


def test_saved_traces_give_the_same_cause(tmp_path: Path) -> None:
    """Rows of another layer are in the trace of a run, so that it is named when the run is judged again."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    with FAULTS["cache_of_the_layer_below"].plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3, out=tmp_path / "run")

    again, _ = judge_directory(tmp_path / "run")

    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "kv_of_other_layer"
    assert again.diagnosis == audit.diagnosis


@pytest.mark.parametrize("name", ["rope_tables_bf16", "kv_bf16"])
def test_what_the_native_dtype_cannot_hold_is_no_fault_there(name: str) -> None:
    """Tables or rows in bfloat16 change nothing in a model whose own values are in bfloat16."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    with FAULTS[name].plant(model), HFEngine(model) as engine:
        tokens = tuple(PROMPTS["p"])
        prompt = Prompt("p", tokens, continue_greedily(engine, tokens, 3))
        run = Measured(AuditPlan(span=3), engine.info, [prompt], created="")
        for item in capture_prompt(engine, prompt, run.modes, "bfloat16"):
            run.add(item)

    decision = decide_route(run)

    assert decision.first_failure is None
    assert all(native.first is None for native in decision.natives.values())
    assert run.suspects.kept == {}


def test_a_sink_that_no_call_tells_of_is_not_taken_for_another_dtype() -> None:
    model = build("hy_v4").to(torch.bfloat16)
    with FAULTS["sink_missing"].plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.changed > 0
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "sink_missing"
    assert "leave a share to a sink" in audit.diagnosis.text


@pytest.mark.parametrize(
    ("architecture", "name", "cause", "told"),
    [
        ("gpt2", "norm_epsilon_x100", "norm_epsilon", "larger by 0.00099"),
        *further(
            ("gpt_neox", "norm_epsilon_x0.1", "norm_epsilon", "smaller by 9e-06"),
            ("gpt2", "norm_inverse_in_bf16", "norm_dtype", "inverse root to bfloat16"),
        ),
    ],
)
def test_the_factor_of_a_row_is_told_before_the_bias_of_a_layer_norm(
    architecture: str, name: str, cause: str, told: str
) -> None:
    model = build(architecture).to(torch.bfloat16)  # whose biases are not zero
    with FAULTS[name].plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.changed > 0
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause
    assert told in audit.diagnosis.text


def test_a_rotation_of_any_part_of_a_head_has_its_cause() -> None:
    model = build("mimo_v2_flash").to(torch.bfloat16)  # rotates a third of it
    with FAULTS["rope_linear_scaling_of_4"].plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert commits.changed > 0
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "rope_scaling"


def test_a_clean_model_has_no_diagnosis() -> None:
    assert kvdrift.audit(tiny_model("llama"), prompts=PROMPTS, span=2).diagnosis is None
