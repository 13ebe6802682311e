"""A graph without the scheduler's callback gives the logits of the recorded passes."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.engines.llamacpp.sequence import Context
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift_bench.models.tiny_gguf import write_tiny_gguf


def audit(folder: Path) -> Audit:
    path = folder / "tiny.gguf"
    with LlamaCppEngine(path if path.exists() else write_tiny_gguf(path, "llama"), threads=1) as engine:
        return audit_engine(engine, AuditPlan(span=2), {"a": (3, 9, 17, 22, 41, 7, 60)}, engine.encode, out=None)


def test_the_callback_changes_nothing(tmp_path: Path) -> None:
    found = audit(tmp_path)
    assert found.exit_code == 0
    evidence = {item.instrument: item for item in found.evidence}
    assert evidence["repeat"].statistic == 0.0
    assert evidence["unobserved"].statistic is not None
    assert evidence["unobserved"].statistic < 1e-6  # the recorded prefill gives the logits of several tokens
    assert "OBSERVED_DIFFERS" not in {caveat.code for caveat in found.caveats}


def test_a_graph_that_computes_something_else_without_it_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = Context._logits

    def wrong(self: Context, row: int) -> Any:
        return np.asarray(right(self, row) * np.float32(1.0 if self._watched else 1.5))  # type: ignore[operator]

    monkeypatch.setattr(Context, "_logits", wrong)
    found = audit(tmp_path)
    assert (found.verdict, found.kind) == (Verdict.MISMATCH, "semantic")
    assert "while nothing watches" in found.decision.reasons[0]
