"""kvdrift: is the difference between prefill and cached decode rounding, or a bug?

    import kvdrift
    result = kvdrift.audit(model, tokenizer, prompts={"p": [1, 2, 3]})
    result.verdict, result.first_failure
    result.check()                             # raises if it is not a pass

Importing this package imports no inference engine; the engine is imported when it is asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from kvdrift.errors import (
    AlignmentError,
    CaptureError,
    EngineUnavailable,
    KvdriftError,
    NotApplicable,
    TraceError,
    UsageError,
    VerdictError,
)
from kvdrift.scenarios.model import Scenario
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Evidence, Verdict
from kvdrift.vocabulary.sites import Site

__version__ = "0.1.0"

if TYPE_CHECKING:
    from kvdrift.engines.own.engine import Engine
    from kvdrift.engines.own.torch_engine import TorchEngine
    from kvdrift.engines.torch.shown import shown
    from kvdrift.pipeline.assertion import assert_no_kv_mismatch
    from kvdrift.pipeline.audit import audit
    from kvdrift.pipeline.compare import compare
    from kvdrift.pipeline.record import record


# What brings a whole part along is imported when it is first asked for.
_LATE = {
    "Engine": "kvdrift.engines.own.engine",
    "TorchEngine": "kvdrift.engines.own.torch_engine",
    "assert_no_kv_mismatch": "kvdrift.pipeline.assertion",
    "audit": "kvdrift.pipeline.audit",
    "compare": "kvdrift.pipeline.compare",
    "record": "kvdrift.pipeline.record",
    "shown": "kvdrift.engines.torch.shown",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value = getattr(import_module(_LATE[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


__all__ = [
    "Address",
    "AlignmentError",
    "CaptureError",
    "Caveat",
    "Diagnosis",
    "Engine",
    "EngineUnavailable",
    "Evidence",
    "KvdriftError",
    "NotApplicable",
    "Scenario",
    "Site",
    "TorchEngine",
    "TraceError",
    "UsageError",
    "Verdict",
    "VerdictError",
    "assert_no_kv_mismatch",
    "audit",
    "compare",
    "record",
    "shown",
]
