"""Kernels that are no calls of torch: what they read is seen where their author shows it."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.shown import ShownKernel
from kvdrift.errors import UsageError
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import (
    PROMPTS,
    Core,
    Decoder,
    Layer,
    engine,
    first_of,
)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
Ladder = Literal["model", "off"]
AUDITS: list[tuple[torch.dtype, Ladder]] = [
    (torch.float32, "model"),
    (torch.bfloat16, "model"),
    (torch.bfloat16, "off"),
    (torch.float16, "off"),
]


def _in_numpy(query: Tensor, key: Tensor, value: Tensor, of_8_bits: bool = False, share: float = 1.0) -> Tensor:
    """Causal attention; of integers, with keys less their mean; scores are times `share`."""
    heads = query.shape[1] // key.shape[1]
    q, k, v = (each.to(torch.float64).numpy() for each in (query, key, value))
    k, v = (each.repeat(heads, 1) for each in (k, v))
    scale = q.shape[-1] ** -0.5 * share
    if of_8_bits:
        k = k - k.mean(2, keepdims=True)
        (q, of_queries), (k, of_keys) = (_rounded(each) for each in (q, k))
        scores = q @ k.swapaxes(2, 3) * of_queries * of_keys.swapaxes(2, 3) * scale
    else:
        scores = q @ k.swapaxes(2, 3) * scale
    tokens, keys = scores.shape[2:]
    scores = np.where(np.arange(keys) <= np.arange(keys - tokens, keys)[:, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return torch.from_numpy(weights / weights.sum(-1, keepdims=True) @ v).to(query.dtype)


def _rounded(rows: Any) -> tuple[Any, Any]:
    step = np.float32(np.abs(rows).max(-1, keepdims=True) / 127.0)
    return np.round(rows.astype(np.float32) / step).astype(np.float64), step.astype(np.float64)


def _core(kernel: Any, of_8_bits: bool, share: float = 1.0, is_lost: bool = False) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if is_lost and decoding:
            values = torch.cat([values[:, :, 1:2], values[:, :, 1:]], dim=2)
        made: Tensor = kernel(query, keys, values, of_8_bits=of_8_bits, share=share if decoding else 1.0)
        return made

    return core


def _audited(right: Core, wrong: Core, dtype: torch.dtype, ladder: Ladder) -> Any:
    """The audit of a decoder of two layers; the second one attends as is `wrong`."""
    layers = [Layer(n, core) for n, core in enumerate((right, wrong))]
    return kvdrift.audit(engine(Decoder(layers), dtype), prompts=PROMPTS, span=2, ladder=ladder)


@pytest.mark.parametrize(("dtype", "ladder"), AUDITS)
@pytest.mark.parametrize("of_8_bits", [False, True])
def test_a_kernel_that_is_shown_is_replayed(dtype: torch.dtype, ladder: Ladder, of_8_bits: bool) -> None:
    kernel = kvdrift.shown(_in_numpy)
    right, wrong = _core(kernel, of_8_bits), _core(kernel, of_8_bits, share=1.05)

    clean, large = _audited(right, right, dtype, ladder), _audited(right, wrong, dtype, ladder)

    assert clean.verdict in PASSES, (clean.first_failure, clean.decision.reasons)
    assert (large.verdict, first_of(large)) == (Verdict.MISMATCH, (1, "attn_ctx"))


def test_a_value_that_a_shown_kernel_is_given_is_named() -> None:
    kernel = kvdrift.shown(_in_numpy)
    audit = _audited(_core(kernel, False), _core(kernel, False, is_lost=True), torch.float32, "model")

    assert (audit.verdict, first_of(audit)) == (Verdict.MISMATCH, (1, "v_cache"))


def test_a_kernel_of_8_bits_that_is_hidden_is_a_mismatch_that_says_what_would_tell_it() -> None:
    hidden = _core(_in_numpy, True)
    audit = _audited(hidden, hidden, torch.bfloat16, "model")

    assert audit.verdict is Verdict.MISMATCH
    (said,) = (item["text"] for item in audit.view["caveats"] if item["code"] == "PREFILL_UNSTABLE")
    assert "kvdrift.shown" in said


def test_a_shown_kernel_computes_what_the_kernel_does() -> None:
    query, key, value = (torch.randn(1, 2, 5, 8) for _ in range(3))
    kernel = kvdrift.shown(_in_numpy)

    assert isinstance(kernel, ShownKernel)
    assert torch.equal(kernel(query, key, value, share=0.5), _in_numpy(query, key, value, share=0.5))


def test_what_cannot_be_called_cannot_be_shown() -> None:
    with pytest.raises(UsageError, match="pass a function"):
        kvdrift.shown("kernel")  # type: ignore[arg-type]
