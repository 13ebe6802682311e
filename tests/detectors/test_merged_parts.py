"""Attention merged from parts that are kept in 16 bits: rounding in a model of 16 bits, and a fault in it is found."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.replay.attention import Operands, attend
from kvdrift.replay.merged import merged_contexts
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import AttentionSpec
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.models.tiny import lively_model
from kvdrift_bench.planted.torch.own import handed, repeated, scores_of
from kvdrift_bench.planted.torch.parts import wide
from kvdrift_bench.planted.torch.ways import AttentionCall, in_attention, planted
from tests.support.matrix import further
from tests.support.own_decoder import SCALE, Core, audited, by_query_head, causal, plain

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}
Cut = Callable[[Tensor], Tensor]


def to(dtype: torch.dtype) -> Cut:
    return lambda numbers: numbers.to(dtype).to(numbers.dtype)


def whole(numbers: Tensor) -> Tensor:
    return numbers


def truncated(numbers: Tensor) -> Tensor:
    """Cut off to bfloat16 where rounding would do."""
    kept: Tensor = (numbers.float().contiguous().view(torch.int32) & -65536).view(torch.float32)
    return kept.to(numbers.dtype)


def merged(
    scores: Tensor, values: Tensor, sizes: list[int], of_logs: Cut, of_contexts: Cut, base: float = 1.0
) -> Tensor:
    """Attention [1, head, token, dim] by parts of so many keys, whose results are kept in fewer bits."""
    cuts = np.cumsum([0, *sizes]).tolist()
    contexts, logs = [], []
    for first, last in pairwise(cuts):
        part = scores[..., first:last]
        top = part.amax(-1, keepdim=True)
        weights = torch.exp(part - top)
        total = weights.sum(-1, keepdim=True)
        contexts.append(of_contexts(weights @ values[..., first:last, :] / total))
        logs.append(of_logs((top + total.log()) * base) / base)
    told = torch.stack(logs)
    share = torch.exp(told - told.amax(0))
    return (torch.stack(contexts) * share).sum(0) / share.sum(0)


def thirds(n_keys: int) -> list[int]:
    return [len(part) for part in np.array_split(np.arange(n_keys), 3)]


def blocks(n_keys: int) -> list[int]:
    return [4] * (n_keys // 4) + ([n_keys % 4] if n_keys % 4 else [])


def by_parts(of_logs: Cut, of_contexts: Cut, sizes: Callable[[int], list[int]] = thirds) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        scores = wide(query) @ wide(by_query_head(keys)).mT * SCALE
        return merged(scores, wide(by_query_head(values)), sizes(scores.shape[-1]), of_logs, of_contexts).to(
            query.dtype
        )

    return core


def codes(audit: Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


@pytest.mark.parametrize(
    ("of_logs", "of_contexts", "sizes"),
    [
        (to(torch.bfloat16), whole, thirds),
        *further(
            (to(torch.float16), whole, thirds),
            (whole, to(torch.bfloat16), thirds),
            (to(torch.bfloat16), to(torch.bfloat16), blocks),
        ),
    ],
)
def test_parts_of_16_bits_in_decode_alone_are_rounding(
    of_logs: Cut, of_contexts: Cut, sizes: Callable[[int], list[int]]
) -> None:
    audit = audited(by_parts(of_logs, of_contexts, sizes), torch.bfloat16)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, (audit.first_failure, audit.decision.reasons)
    assert "PARTS_OF_16_BITS" in codes(audit)


@pytest.mark.parametrize(
    ("of_logs", "of_contexts", "dtype"),
    [
        (truncated, whole, torch.bfloat16),
        *further(
            (to(torch.float8_e4m3fn), whole, torch.bfloat16),
            (to(torch.bfloat16), lambda context: context * 1.001, torch.bfloat16),
            (to(torch.bfloat16), whole, torch.float32),
        ),
    ],
)
def test_what_is_no_rounding_of_parts_is_a_fault(of_logs: Cut, of_contexts: Cut, dtype: torch.dtype) -> None:
    """Numbers that are cut off or have 8 bits, parts that are too large as well, and 16 bits in a model of float32."""
    audit = audited(by_parts(of_logs, of_contexts), dtype)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.ATTN_CTX)
    assert "PARTS_OF_16_BITS" not in codes(audit)


SINKS = torch.tensor([0.5, -1.0, 1.5, 0.0])[None, :, None, None]


def with_sinks(of_logs: Cut, of_contexts: Cut, of_sinks: Callable[[Tensor], Tensor] = whole) -> Core:
    """Sinks beside the keys in prefill; in decode they take their part where three parts are merged."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = wide(query) @ wide(by_query_head(keys)).mT * SCALE
        sinks = SINKS.to(scores.dtype)
        if not decoding:
            scores = scores.masked_fill(~causal(query, keys, start), -torch.inf)
            scores = torch.cat([scores, sinks.expand(1, -1, query.shape[2], 1)], -1)
            return (torch.softmax(scores, -1)[..., :-1] @ wide(by_query_head(values))).to(query.dtype)
        context = merged(scores, wide(by_query_head(values)), thirds(scores.shape[-1]), of_logs, of_contexts)
        total = merged_logs(scores, thirds(scores.shape[-1]), of_logs)
        return (context / (1.0 + torch.exp(of_sinks(sinks) - total))).to(query.dtype)

    return core


def merged_logs(scores: Tensor, sizes: list[int], of_logs: Cut) -> Tensor:
    """The log-sum of all keys, from those of parts that are kept in fewer bits."""
    logs = [of_logs(part.logsumexp(-1, keepdim=True)) for part in torch.split(scores, sizes, -1)]
    return torch.stack(logs).logsumexp(0)


@pytest.mark.parametrize(
    ("of_logs", "of_contexts"),
    [(to(torch.bfloat16), whole), *further((whole, to(torch.bfloat16)), (to(torch.float16), to(torch.float16)))],
)
def test_a_sink_takes_its_part_where_parts_are_merged(of_logs: Cut, of_contexts: Cut) -> None:
    audit = audited(with_sinks(of_logs, of_contexts), torch.bfloat16)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, (audit.first_failure, audit.decision.reasons)
    assert "PARTS_OF_16_BITS" in codes(audit)


@pytest.mark.parametrize(
    "of_sinks", [lambda sinks: sinks + 0.02, *further(lambda sinks: sinks.roll(1, 1), lambda sinks: sinks - torch.inf)]
)
def test_another_sink_is_a_fault_beside_such_rounding(of_sinks: Callable[[Tensor], Tensor]) -> None:
    audit = audited(with_sinks(to(torch.bfloat16), whole, of_sinks), torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 1
    assert "PARTS_OF_16_BITS" not in codes(audit)


def test_a_part_that_is_lost_is_a_fault_beside_such_rounding() -> None:
    rounded = by_parts(to(torch.bfloat16), whole)

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        if not decoding:
            return plain(query, keys, values, start, decoding)
        kept = slice(0, keys.shape[2] - 2)
        return rounded(query, keys[:, :, kept], values[:, :, kept], start, decoding)

    audit = audited(core, torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.ATTN_CTX)


def _in_model(of_logs: Cut, base: float) -> Audit:
    @in_attention
    def attention(call: AttentionCall) -> Tensor:
        keys, values = repeated(call)
        scores = scores_of(call, keys)
        return handed(call, merged(scores, wide(values), thirds(scores.shape[-1]), of_logs, whole, base))

    with planted(attention)(model := lively_model("llama", torch.bfloat16)):
        return kvdrift.audit(model, prompts=PROMPTS, span=2)


@pytest.mark.parametrize("base", [1.0, pytest.param(1.4426950408889634, marks=pytest.mark.matrix)])
def test_a_model_of_transformers_with_such_a_kernel_passes(base: float) -> None:
    audit = _in_model(to(torch.bfloat16), base)

    assert audit.verdict is Verdict.STRUCTURAL_DRIFT, (audit.first_failure, audit.decision.reasons)
    assert "PARTS_OF_16_BITS" in codes(audit)


def test_every_part_as_fine_as_the_rest_is_attention_itself() -> None:
    draw = np.random.default_rng(3)
    operands = Operands(
        draw.standard_normal((4, 8)),
        draw.standard_normal((24, 2, 8)),
        draw.standard_normal((24, 2, 8)),
        np.arange(24),
        23,
        AttentionSpec(scale=0.35),
    )
    exact = attend(operands).context
    off = [float(np.linalg.norm(way - exact) / np.linalg.norm(exact)) for way in merged_contexts(operands, "float16")]

    assert len(off) > 50
    assert float(np.median(off)) > 1e-6
    assert max(off) < 5e-3
