"""Attention that rounds its operands once more, or runs in 16 bits behind casts: right, and not an alarm; a fault in it
is found all the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.operands import are_of_rounded
from kvdrift.replay.attention import Operands
from kvdrift.replay.casts import kept_in, rounded_operands
from kvdrift.replay.eight_bits import Way
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift_bench.models.tiny import lively_model
from tests.support.kernels import attend, attention_of

# An audit takes about a second, one with the ladder three.
_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (14, 18, 23)}
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def weighed(scores: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
    n, m = scores.shape[-2:]
    scores = scores.masked_fill(~torch.ones(n, m, dtype=torch.bool).tril(m - n), -torch.inf)
    found: Tensor = (torch.softmax(scores, -1, dtype=torch.float32) @ value.float()).to(dtype).transpose(1, 2)
    return found.contiguous()


def smoothed(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    smooth = (key.float() - key.float().mean(2, keepdim=True)).to(key.dtype)
    return weighed(query.float() @ smooth.float().transpose(2, 3) * scale, value, query.dtype)


def prescaled(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    scaled = (query.float() * scale).bfloat16()
    return weighed(scaled.float() @ key.float().transpose(2, 3), value, query.dtype)


def in_16_bits(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    return attend(query.bfloat16(), key.bfloat16(), value.bfloat16(), scale).to(query.dtype)


def in_int8(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Integers of 8 bits, a scale for each row; the products are exact (SageAttention)."""
    rows = [(row.float(), row.float().abs().amax(-1, keepdim=True) / 127) for row in (query, key)]
    (q, of_q), (k, of_k) = ((torch.round(row / step), step) for row, step in rows)
    products = (q.double() @ k.double().transpose(2, 3)).float()
    return weighed(products * (of_q * of_k.transpose(2, 3) * scale), value, query.dtype)


def in_fp8(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Queries, keys and values in float8, a scale for each row (FlashAttention 3)."""

    def rounded(rows: Tensor) -> Tensor:
        step = rows.float().abs().amax(-1, keepdim=True) / 448
        return (rows.float() / step).to(torch.float8_e4m3fn).float() * step

    return weighed(rounded(query) @ rounded(key).transpose(2, 3) * scale, rounded(value), query.dtype)


def in_decode(first: Attend, then: Attend) -> Attend:
    def way(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        return (then if query.shape[2] == 1 else first)(query, key, value, scale)

    return way


def other_scale(way: Attend, factor: float) -> Attend:
    return lambda query, key, value, scale: way(query, key, value, scale * factor)


def other_values(way: Attend, factor: float) -> Attend:
    return lambda query, key, value, scale: way(query, key, value * factor, scale)


def audited(way: Attend, dtype: str, ladder: Any) -> Any:
    model = lively_model("llama", getattr(torch, dtype))
    with attention_of(model, way):
        return kvdrift.audit(model, prompts=PROMPTS, span=3, ladder=ladder)


matrix = pytest.mark.matrix


@pytest.mark.parametrize(
    ("way", "dtype", "ladder"),
    [
        (in_decode(attend, smoothed), "bfloat16", "off"),
        (in_decode(attend, prescaled), "bfloat16", "model"),
        (in_int8, "float32", "model"),
        (in_fp8, "bfloat16", "off"),
        pytest.param(in_int8, "bfloat16", "off", marks=matrix),
        pytest.param(in_fp8, "float32", "model", marks=matrix),
        pytest.param(prescaled, "float32", "model", marks=matrix),
        pytest.param(in_16_bits, "float32", "model", marks=matrix),
        pytest.param(smoothed, "bfloat16", "model", marks=matrix),
        pytest.param(in_decode(attend, smoothed), "float16", "off", marks=matrix),
        pytest.param(in_decode(attend, prescaled), "bfloat16", "off", marks=matrix),
        pytest.param(smoothed, "float32", "model", marks=matrix),
    ],
)
def test_right_attention_passes(way: Attend, dtype: str, ladder: Any) -> None:
    audit = audited(way, dtype, ladder)
    assert audit.exit_code == 0, (audit.first_failure, audit.evidence)


@pytest.mark.parametrize(
    ("way", "dtype", "ladder", "site"),
    [
        (in_decode(attend, other_scale(smoothed, 1.01)), "bfloat16", "off", "attn_scores"),
        (in_decode(attend, in_16_bits), "float32", "off", "attn_ctx"),
        (other_scale(in_int8, 1.1), "float32", "model", "attn_ctx"),
        pytest.param(in_decode(in_int8, other_values(in_int8, 1.02)), "float32", "model", "attn_ctx", marks=matrix),
        pytest.param(in_decode(attend, in_int8), "float32", "model", "attn_scores", marks=matrix),
        pytest.param(other_values(in_fp8, 1.1), "bfloat16", "off", "attn_ctx", marks=matrix),
        pytest.param(
            in_decode(in_16_bits, other_values(in_16_bits, 1.2)), "float32", "model", "attn_ctx", marks=matrix
        ),
        pytest.param(in_decode(attend, prescaled), "float32", "model", "attn_scores", marks=matrix),
    ],
)
def test_a_fault_of_such_attention_is_found(way: Attend, dtype: str, ladder: Any, site: str) -> None:
    audit = audited(way, dtype, ladder)
    assert audit.verdict is Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (0, site)


def test_under_autocast_the_first_sentence_names_its_dtype() -> None:
    model = lively_model("llama", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=3, ladder="off")
    assert audit.exit_code == 0
    assert "computed in bfloat16 with weights in float32" in repr(audit)


# --------------------------------------------------------------------------------------------- what is told by numbers


def scores_of(query: Tensor, key: Tensor) -> Tensor:
    return torch.einsum("hd,hkd->hk", query[0, :, 0].double(), key[0].double())[None]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_rounded_operands_are_told_from_a_wrong_scale(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(3)
    query = torch.randn(1, 2, 1, 64, generator=generator).to(dtype)
    key = (2.0 + torch.randn(1, 2, 40, 64, generator=generator)).to(dtype)
    smooth = (key.float() - key.float().mean(2, keepdim=True)).to(dtype)
    scaled = (query.float() * 0.125).to(dtype)

    def of(q: Tensor, k: Tensor, scale: float) -> bool:
        scores = (scores_of(q, k) * scale).float()
        return are_of_rounded(scores, query, key, 0.125, lambda a, b: scores_of(a, b) * 0.125)

    assert of(query, smooth, 0.125)
    assert of(scaled, smooth, 1.0)
    assert not of(query, key, 0.125), "nothing was rounded"
    assert not of(query, smooth, 0.125 * 1.0005)
    assert not of(query, smooth.roll(1, 2), 0.125)


def test_what_16_bits_hold_and_how_operands_are_rounded() -> None:
    exact = np.random.default_rng(1).normal(size=(2, 8))
    half = exact.astype(np.float16).astype(np.float64)
    coarse = torch.from_numpy(exact).bfloat16().double().numpy()
    assert kept_in([coarse, coarse]) == "bfloat16"
    assert kept_in([half, coarse]) == "float16"
    assert kept_in([half, exact]) is None
    assert kept_in([coarse, np.full(3, np.nan)]) is None
    assert kept_in([np.zeros(3)]) is None
    given = Operands(exact, exact[:, None], exact[:, None], np.arange(2), 1, AttentionSpec(scale=0.3))
    queries = [other.query for other in rounded_operands(given)]
    assert all(np.allclose(query, exact, rtol=2.0**-8) for query in queries)
    assert not any(np.array_equal(query, exact) for query in queries)
    in_integers, in_float8 = (Way(kind).of(given, exact).query for kind in ("int8", "float8"))
    step = np.abs(exact).max(axis=1, keepdims=True) / 127.0
    assert (np.abs(in_integers - exact) <= 0.5001 * step).all()
    assert np.allclose(in_float8, exact, rtol=2.0**-4, atol=float(step.max()) / 64.0)
