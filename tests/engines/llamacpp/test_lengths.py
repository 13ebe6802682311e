"""A sweep over lengths runs in llama.cpp as it does in torch."""

from pathlib import Path

import pytest

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.errors import UsageError
from kvdrift.pipeline.audit import audit_engine
from kvdrift.vocabulary.plan import AuditPlan
from tests.support.gguf import beginning


def test_every_length_is_a_prompt_and_the_clean_model_has_no_mismatch(folder: Path) -> None:
    with LlamaCppEngine(beginning(folder), folder=folder, layers=(0, 1, 2), threads=1) as engine:
        plan = AuditPlan(span=2, layers=(0, 1, 2), lengths=(7, 8, 9))
        audit = audit_engine(engine, plan, None, engine.encode, out=None)
        with pytest.raises(UsageError, match="--lengths names 999999; with a span of 2 that is 1000001"):
            audit_engine(engine, AuditPlan(span=2, lengths=(7, 999_999)), None, engine.encode, out=None)

    rows = audit.view["lengths"]["rows"]
    assert audit.exit_code == 0, audit.decision.reasons
    assert [(row["length"], row["prompt"]) for row in rows] == [(7, "length_7"), (8, "length_8"), (9, "length_9")]
    assert {row["verdict"] for row in rows} <= {"EXACT", "STRUCTURAL_DRIFT"}
    assert not [item for item in audit.view["lengths"]["boundaries"] if item["change"] == "mismatch"]
