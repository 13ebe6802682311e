"""The cause of a planted fault is named, with its parameters; what is in no catalogue is unexplained, not misnamed."""

import pytest
import torch

import kvdrift
from kvdrift.faults import corpus_for
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
    ("llama", "norm_epsilon_x10", "norm_epsilon", "larger by"),
    ("llama", "logits_scaled_1.01", "logit_scale", "1.01"),
]

# Faults whose cause is in no catalogue.
UNEXPLAINED = ["activation_approximated", "context_heads_rolled", "query_strides_ignored"]


@pytest.mark.parametrize(("architecture", "name", "cause", "told"), NAMED, ids=lambda value: str(value)[:24])
def test_the_cause_is_named_with_its_parameters(architecture: str, name: str, cause: str, told: str) -> None:
    model = tiny_model(architecture, dtype=torch.bfloat16)

    with FAULTS[name].plant(model) as commits:
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3)

    assert commits.count > 0
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == cause, audit.diagnosis
    assert told in audit.diagnosis.text
    assert 0.999 <= audit.diagnosis.explained <= 1.0


@pytest.mark.parametrize("name", UNEXPLAINED)
def test_what_is_in_no_catalogue_is_unexplained(name: str) -> None:
    model = tiny_model("llama", dtype=torch.bfloat16)

    with FAULTS[name].plant(model):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause == "unexplained"
    assert "no cause of the catalogue" in audit.diagnosis.text


def test_a_clean_model_has_no_diagnosis() -> None:
    assert kvdrift.audit(tiny_model("llama"), prompts=PROMPTS, span=2).diagnosis is None
