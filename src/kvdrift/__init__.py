"""kvdrift: is the difference between prefill and cached decode rounding, or a bug?

    import kvdrift
    result = kvdrift.audit(model, tokenizer, prompts={"p": [1, 2, 3]})
    result.verdict, result.first_failure

Importing this package imports no inference engine; the engine is imported when it is asked for.
"""

from __future__ import annotations

from kvdrift.address import Address
from kvdrift.errors import (
    AlignmentError,
    CaptureError,
    EngineUnavailable,
    KvdriftError,
    TraceError,
    UsageError,
)
from kvdrift.sites import Site
from kvdrift.verdict.model import Caveat, Diagnosis, Evidence, Verdict

__version__ = "0.1.0"
