"""A sink that takes its part behind the softmax: the same attention, and a sink that is lost or wrong is a fault."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from kvdrift.pairing.attention_rows import at_totals
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.matrix import further
from tests.support.own_decoder import HEADS, SCALE, Core, audited, by_query_head, causal

SINKS = (0.9, -0.4, 1.6, 0.2)


def behind(*, factor: float = 1.0, shift: float = 0.0, at_16_bits: bool = False) -> Core:
    """Prefill has its sinks beside the keys; decode multiplies what comes out by what they leave."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        sinks = torch.tensor(SINKS, dtype=wide)[:, None, None]
        scores = query.to(wide) @ by_query_head(keys).to(wide).mT * SCALE
        scores = scores.masked_fill(~causal(query, keys, start), -torch.inf)
        rows = by_query_head(values).to(wide)
        if not decoding:
            column = sinks.expand(HEADS, scores.shape[2], 1)[None]
            return torch.matmul(torch.cat([scores, column], -1).softmax(-1)[..., :-1], rows).to(query.dtype)
        is_wrong = not (at_16_bits and query.dtype == torch.float64)
        left = torch.sigmoid(scores.logsumexp(-1, keepdim=True) - sinks - (shift if is_wrong else 0.0))
        return (torch.matmul(scores.softmax(-1), rows) * left * (factor if is_wrong else 1.0)).to(query.dtype)

    return core


@pytest.mark.parametrize("dtype", [torch.bfloat16, *further(torch.float16, torch.float32)])
def test_a_sink_behind_the_softmax_passes(dtype: torch.dtype) -> None:
    audit = audited(behind(), dtype)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


@pytest.mark.parametrize(
    ("factor", "shift", "at_16_bits"),
    [(1.0, -50.0, False), *further((1.0, 0.01, False), (1.001, 0.0, False), (1.0, 0.5, True), (1.1, 0.0, True))],
)
def test_a_sink_that_is_lost_or_wrong_there_is_found(factor: float, shift: float, at_16_bits: bool) -> None:
    audit = audited(behind(factor=factor, shift=shift, at_16_bits=at_16_bits), torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 1
    assert audit.first_failure.site in (Site.ATTN_PROBS, Site.ATTN_CTX)


def test_probabilities_are_brought_to_one_total_only_where_contexts_are_the_same() -> None:
    draw = np.random.default_rng(1)
    right = draw.dirichlet(np.ones(9), size=4) * np.array([[0.8], [0.5], [0.9], [1.0]])
    whole, contexts = right / right.sum(axis=1, keepdims=True), draw.standard_normal((2, 32))
    same = (contexts[0], contexts[0])

    assert np.allclose(at_totals(right, whole, same), right, rtol=1e-14)
    assert at_totals(right, whole, (contexts[0], contexts[1])) is whole
    assert at_totals(right, whole, None) is whole
    other = whole.copy()
    other[1, [0, 1]] = other[1, [1, 0]]
    assert at_totals(right, other, same) is other
    missing = np.where(np.arange(9) == 3, np.nan, whole)
    assert at_totals(right, missing, same) is missing
    larger = np.multiply(whole, 1.001)
    assert at_totals(whole, larger, same) is larger, "no softmax has a total above 1"
    smaller = np.multiply(right, 0.5)
    assert at_totals(right, smaller, same) is smaller, (
        "a softmax with its sink beside the keys has a total of 1 with it"
    )
