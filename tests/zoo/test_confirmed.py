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
        ("diffllama", "float8_cache", None),  # right: it reads its values in two halves, one after the other
        pytest.param(
            "roformer", "batch_padded", None, marks=pytest.mark.matrix
        ),  # right: it rotates by slot, and only differences of positions count
        pytest.param(
            "deepseek_v32", "last_positions", None, marks=pytest.mark.matrix
        ),  # right: no two scores are equal
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
