"""How a kernel reads right operands: each way that is wrong has its name, with what was measured of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.vocabulary.causes import Cause
from tests.support.attention import attending

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
FAULTY = 1
_QUERY = torch.randn(1, 4, 1, 16, generator=torch.Generator().manual_seed(4))

Kernel = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _weighed(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    weights = torch.softmax(torch.einsum("bhqd,bhkd->bhqk", wide(q), wide(k)) * scale, -1)
    return torch.einsum("bhqk,bhkd->bhqd", weights, wide(v))


def heads_exchanged(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _weighed(q[:, [2, 1, 0, 3]], k, v, scale)


def frozen_query(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _weighed(_QUERY.to(q.dtype), k, v, scale)


def values_of_float8(v: Tensor, factor: float) -> Tensor:
    rows = wide(v).numpy()
    scale = factor * np.abs(rows).max() / 448.0
    codes = np.clip(rows / scale, -448.0, 448.0).astype(ml_dtypes.float8_e4m3fn)
    return torch.from_numpy(codes.astype(rows.dtype) * scale).to(wide(v).dtype)


def scale_of_the_step_before(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return _weighed(q, k, values_of_float8(v, 0.9), scale)


def _by_powers(powers: Callable[[Tensor], Tensor]) -> Kernel:
    def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        scores = wide(q) @ wide(k).mT * scale
        weights = powers((scores - scores.amax(-1, keepdim=True)) * 1.4426950408889634)
        return weights @ wide(v) / weights.sum(-1, keepdim=True)

    return attend


def _straight(x: Tensor) -> Tensor:
    whole = torch.floor(x)
    return torch.ldexp(1.0 + (x - whole), whole.int())


def _cubic(x: Tensor) -> Tensor:
    """2^f by a polynomial of the third degree (FlashAttention 4)."""
    whole = torch.floor(x)
    part = x - whole
    return torch.ldexp(1.0 + part * (0.69514614 + part * (0.22756439 + part * 0.07711909)), whole.int())


def _limit(x: Tensor) -> Tensor:
    """e^x as (1 + x / n)^n."""
    return (1.0 + x * 0.6931471805599453 / 256.0).clamp(min=0.0) ** 256


FAULTS: dict[str, tuple[Kernel, Cause, str]] = {
    "heads exchanged": (heads_exchanged, Cause.Q_HEADS_PERMUTED, "[2, 1, 0, 3]"),
    "frozen query": (frozen_query, Cause.QUERY_FROZEN, "one query at every step"),
    "scale of the step before": (scale_of_the_step_before, Cause.VALUES_ROUNDED_FP8, "0.9 times that of its largest"),
    "powers by a line": (_by_powers(_straight), Cause.EXP_APPROXIMATED, "the fraction of their exponent"),
    "powers by a cubic": (_by_powers(_cubic), Cause.EXP_APPROXIMATED, "the fraction of their exponent"),
    "powers by a limit": (_by_powers(_limit), Cause.EXP_APPROXIMATED, "their whole exponent"),
}
CORE = ("heads exchanged", "frozen query", "scale of the step before", "powers by a line")


def audited(kernel: Kernel) -> Any:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> Any:
        if q.shape[2] > 1 or module.layer_idx != FAULTY:
            return sdpa_attention_forward(module, q, k, v, mask, **options)
        k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return kernel(q, k, v, options["scaling"]).to(q.dtype).transpose(1, 2).contiguous(), None

    with attending(attend, "reading") as model:
        return kvdrift.audit(model, prompts=PROMPTS, span=3)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in CORE else [pytest.mark.matrix]) for name in FAULTS]
)
def test_a_wrong_way_to_read_is_named_with_what_was_measured(name: str) -> None:
    kernel, cause, measured = FAULTS[name]
    audit = audited(kernel)

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert audit.first_failure.layer == FAULTY
    assert audit.diagnosis.cause == cause, audit.diagnosis
    assert measured in audit.diagnosis.text


@pytest.mark.parametrize("kernel", [_weighed, _by_powers(torch.exp2)], ids=["softmax", "powers of two"])
def test_right_ways_to_read_pass(kernel: Kernel) -> None:
    audit = audited(kernel)

    assert audit.verdict in (kvdrift.Verdict.EXACT, kvdrift.Verdict.STRUCTURAL_DRIFT), audit.first_failure
