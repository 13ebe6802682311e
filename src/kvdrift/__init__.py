"""kvdrift: is the difference between prefill and cached decode rounding, or a bug?

    import kvdrift
    result = kvdrift.audit(model, tokenizer, prompts={"p": [1, 2, 3]})
    result.verdict, result.first_failure

Importing this package imports no inference engine; the engine is imported when it is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kvdrift.errors import (
    AlignmentError,
    CaptureError,
    EngineUnavailable,
    KvdriftError,
    NotApplicable,
    TraceError,
    UsageError,
)
from kvdrift.scenarios.model import Scenario
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Evidence, Verdict
from kvdrift.vocabulary.sites import Site

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvdrift.pipeline.audit import audit


def __getattr__(name: str) -> Any:
    """Import the audit when it is first asked for: it brings the whole judging core along."""
    if name != "audit":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from kvdrift.pipeline.audit import audit

    globals()[name] = audit
    return audit


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Address",
    "AlignmentError",
    "CaptureError",
    "Caveat",
    "Diagnosis",
    "EngineUnavailable",
    "Evidence",
    "KvdriftError",
    "NotApplicable",
    "Scenario",
    "Site",
    "TraceError",
    "UsageError",
    "Verdict",
    "audit",
]
