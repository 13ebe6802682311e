"""A bias by position that one pass holds in 16 bits is rounding beside another form of it; a wrong slope is a fault."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.matrix import further
from tests.support.own_decoder import HEADS, SCALE, Core, Decoder, Layer, by_query_head, causal, engine

# No powers of two, whose multiples would be numbers of 16 bits by themselves.
SLOPES = (0.8409, 0.5946, 0.2102, 0.0743)
PROMPTS = {name: [(step * i * i + 3) % 61 + 2 for i in range(n)] for name, step, n in (("p", 7, 34), ("q", 5, 27))}
BY_MASK, BY_HAND = "mask", "hand"


def attending(ways: tuple[str, str], *, factor: float = 1.0, at_16_bits: bool = False, one_key: float = 0.0) -> Core:
    """Attention with ALiBi, by a mask of the model's dtype or by hand in float32: prefill's way and decode's."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        wide = torch.float64 if query.dtype == torch.float64 else torch.float32
        is_wrong = decoding and not (at_16_bits and query.dtype == torch.float64)
        seen, n_keys = causal(query, keys, start), keys.shape[2]
        distance = torch.arange(n_keys)[None] - torch.arange(start, start + query.shape[2])[:, None]
        slopes = torch.tensor(SLOPES, dtype=torch.float64)[:, None, None] * (factor if is_wrong else 1.0)
        bias = (slopes * distance)[None]
        if is_wrong and one_key:
            bias = bias + one_key * (torch.arange(n_keys) == n_keys - 4)
        keys, values = by_query_head(keys), by_query_head(values)
        if ways[decoding] == BY_MASK:
            mask = bias.to(query.dtype).masked_fill(~seen, torch.finfo(query.dtype).min)
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask)
        scores = query.to(wide) @ keys.to(wide).mT * SCALE + bias.to(wide)
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.matmul(weights, values.to(wide)).to(query.dtype)

    return core


def audited(core: Core, dtype: torch.dtype = torch.bfloat16) -> Audit:
    assert len(SLOPES) == HEADS
    return kvdrift.audit(engine(Decoder([Layer(0), Layer(1, core)]), dtype), prompts=PROMPTS, span=2)


@pytest.mark.parametrize(
    ("ways", "dtype"),
    [
        ((BY_MASK, BY_HAND), torch.bfloat16),
        *further(
            ((BY_HAND, BY_MASK), torch.bfloat16),
            ((BY_MASK, BY_HAND), torch.float16),
            ((BY_MASK, BY_MASK), torch.bfloat16),
        ),
    ],
)
def test_a_bias_that_one_pass_rounds_to_16_bits_passes(ways: tuple[str, str], dtype: torch.dtype) -> None:
    audit = audited(attending(ways), dtype)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


@pytest.mark.parametrize(
    ("factor", "one_key"),
    [(1.02, 0.0), *further((1.0, 0.3))],
)
@pytest.mark.parametrize("ways", [(BY_MASK, BY_HAND), pytest.param((BY_HAND, BY_MASK), marks=pytest.mark.matrix)])
@pytest.mark.parametrize("at_16_bits", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_one_that_is_off_by_more_is_a_fault(
    ways: tuple[str, str], factor: float, one_key: float, at_16_bits: bool
) -> None:
    audit = audited(attending(ways, factor=factor, one_key=one_key, at_16_bits=at_16_bits))

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.ATTN_SCORES)
