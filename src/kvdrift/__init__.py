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
from kvdrift.vocabulary.plan import LadderChoice, ModeChoice, Prompts
from kvdrift.vocabulary.sites import Site

__version__ = "0.1.0"

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    from kvdrift.pipeline.audit import Audit


def audit(
    model: Any,
    tokenizer: Any = None,
    *,
    prompts: Prompts | None = None,
    mode: ModeChoice = "both",
    span: int = 4,
    alpha: float = 1e-3,
    out: str | Path | None = None,
    layers: tuple[int, ...] | None = None,
    cache: str = "dynamic",
    ladder: LadderChoice = "model",
    seed: int = 0,
    scenarios: str | Sequence[str | Scenario] | None = None,
    lengths: Iterable[int] | None = None,
) -> Audit:
    """Audit a torch `PreTrainedModel`: does its cached decode compute what its prefill computes?

    The model is run as it is, with whatever modules or attention functions it has been given. Hooks, dtypes and
    registrations are restored afterwards, and its parameters are the same bits as before.

    Args:
        model: a decoder-only language model of transformers, on any device.
        tokenizer: needed only for prompts given as text.
        prompts: text or token ids by prompt id; default: three prompts of 1, 16 and 32 tokens or so.
        mode: "as_designed", "kv_aligned" or "both".
        span: how many tokens after each prompt are probed.
        alpha: chance of a false alarm that the whole audit may have.
        out: directory for the report and traces; None writes nothing.
        layers: layers to record, None for all.
        cache: "dynamic" or "static".
        ladder: "model" holds the whole model in float32 and float64 for the upper rungs, "layer" one layer at a time,
            "off" leaves these rungs out: then the native instruments decide alone.
        seed: picks where the positive control is planted.
        scenarios: routes to run, by name or as `kvdrift.Scenario`; "all" for all that apply; None for plain decode.
        lengths: prompt lengths in tokens, such as [64, 65, 128]: the longest prompt is cut or repeated to each of them,
            and the report names the length or position at which decode begins to behave differently.

    Raises:
        UsageError: an argument or a prompt does not fit the model.
        EngineUnavailable: the model has no cached decode step to audit.
        CaptureError: the model failed, or its weights are not finite.
    """
    from kvdrift.pipeline.audit import audit as run_audit

    return run_audit(
        model,
        tokenizer,
        prompts=prompts,
        mode=mode,
        span=span,
        alpha=alpha,
        out=out,
        layers=layers,
        cache=cache,
        ladder=ladder,
        seed=seed,
        scenarios=scenarios,
        lengths=lengths,
    )


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
