"""What the audit of a server is asked to do: frozen options, each default written once, with its reason."""

from __future__ import annotations

import math
from dataclasses import dataclass

from kvdrift.errors import UsageError

# The words that people use for a dtype, and the one that kvdrift uses.
_DTYPES = {
    "float32": "float32",
    "fp32": "float32",
    "float": "float32",
    "float16": "float16",
    "fp16": "float16",
    "half": "float16",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerPlan:
    """The options of one audit of a server.

    Attributes:
        model: the name under which the server serves the model; None takes the only one that there is.
        span: tokens to generate after each prompt. The first comes out of the prefill, all others are decode steps.
        dtype: the dtype that the server computes in, if it does not tell; None if nobody knows.
        alpha: chance of a false alarm that the permutation test may have.
        seed: the sampling seed of the first prompt; the others follow it.
        resolution: the typical error of a logprob, in nats, that a pass must be able to rule out. One stale slot in one
            layer of a small model is about this large.
        max_requests: upper bound on requests sent, retries included.
        timeout_s: how long one answer may take.
        against: the address of a second server that the first one must agree with, None if there is none: the same
            model and build on the same kind of machine, started as the first one is said to be.
        neighbours: requests in flight at once, where the server is asked to batch.
    """

    model: str | None = None
    span: int = 32
    dtype: str | None = None
    alpha: float = 1e-3
    seed: int = 0
    resolution: float = 0.05
    max_requests: int = 300
    timeout_s: float = 60.0
    against: str | None = None
    neighbours: int = 6

    def __post_init__(self) -> None:
        if self.span < 2:
            raise UsageError(
                f"span is {self.span}; a server is asked for at least 2 tokens, because the first one comes out of the "
                "prefill; use --span 32 (span=32)"
            )
        if not 0.0 < self.alpha < 1.0:
            raise UsageError(f"alpha is {self.alpha}, and must lie between 0 and 1; use --alpha 0.001 (alpha=1e-3)")
        if self.max_requests < 1:
            raise UsageError(
                f"max_requests is {self.max_requests}, and must be at least 1; use --max-requests 300 "
                "(max_requests=300)"
            )
        if not (math.isfinite(self.timeout_s) and self.timeout_s > 0.0):
            raise UsageError(f"the timeout is {self.timeout_s} s, and must be above 0; use --timeout 60 (timeout_s=60)")
        if not (math.isfinite(self.resolution) and self.resolution > 0.0):
            raise UsageError(
                f"the resolution is {self.resolution} nats, and must be above 0; use --resolution 0.05 "
                "(resolution=0.05)"
            )
        if self.dtype is not None and self.dtype not in _DTYPES.values():
            raise UsageError(f"unknown dtype {self.dtype!r}; use --dtype float32, float16 or bfloat16 (dtype=...)")


def dtype_name(text: str | None) -> str | None:
    """Return kvdrift's word for a dtype, None for one that it does not know.

    >>> dtype_name("torch.bfloat16")
    'bfloat16'
    """
    return None if text is None else _DTYPES.get(text.lower().removeprefix("torch."))
