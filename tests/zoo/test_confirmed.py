"""Verdicts on types of the registry that a script of transformers alone confirms."""

from __future__ import annotations

import pytest

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.zoo.build import build
from kvdrift.zoo.rows import PROMPTS, SPAN


@pytest.mark.parametrize(
    ("kind", "scenario", "place"),
    [
        ("gpt_neo", "static_cache", "layer 1 / attn_scores"),  # docs/findings/gpt_neo_static_cache.md
        pytest.param("prophetnet", "decode", "layer 0 / attn_ctx", marks=pytest.mark.matrix),  # prophetnet_later_tokens
        pytest.param(  # docs/findings/indexer_of_a_moved_cache.md
            "glm_moe_dsa", "export_import", "layer 0 / attn_scores", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/git_padding_of_a_decode_step.md
            "git", "batch_padded", "layer 0 / attn_scores", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/deepseek_v4_padding.md
            "deepseek_v4", "batch_padded", "layer 1 / attn_probs", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/deepseek_v4_cache.md
            "deepseek_v4", "export_import", "layer 0 / q_rope", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/recurrent_gemma_states.md
            "recurrent_gemma", "recurrent_state", "layer 0 / attn_ctx", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/crop_of_a_recurrent_state.md
            "zaya", "draft_rounds", "layer 0 / q_rope", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/bart_left_padding.md
            "bart", "batch_padded", "layer 0 / layer_in", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/roberta_positions_of_generate.md
            "roberta", "generate_greedy", "layer 0 / layer_in", marks=pytest.mark.matrix
        ),
        pytest.param(  # docs/findings/doge_equal_tokens.md
            "doge", "last_positions", "layer 0 / attn_scores", marks=pytest.mark.matrix
        ),
        ("roberta", "batch_padded", None),  # right: its positions begin behind that of the padding token
        pytest.param("opt", "batch_padded", None, marks=pytest.mark.matrix),  # right: it adds that distance itself
        pytest.param("hy_v4", "last_positions", None, marks=pytest.mark.matrix),  # right, as axk2
        ("diffllama", "float8_cache", None),  # right: it reads its values in two halves, one after the other
        pytest.param(
            "roformer", "batch_padded", None, marks=pytest.mark.matrix
        ),  # right: it rotates by slot, and only differences of positions count
        pytest.param(
            "deepseek_v32", "last_positions", None, marks=pytest.mark.matrix
        ),  # right: no two scores are equal
        pytest.param("deepseek_v32", "draft_rounds", None, marks=pytest.mark.matrix),  # right: two rounds choose alike
    ],
)
def test_a_type_is_judged_as_a_script_of_transformers_alone_confirms(
    kind: str, scenario: str, place: str | None
) -> None:
    audit = kvdrift.audit(build(kind), prompts=PROMPTS, span=SPAN, scenarios=[scenario])

    if place is None:
        assert audit.verdict is Verdict.STRUCTURAL_DRIFT, (audit.first_failure, audit.decision.reasons)
    else:
        assert audit.verdict is Verdict.MISMATCH
        assert str(audit.first_failure).endswith(place)
