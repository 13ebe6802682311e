"""Without the ladder: attention whose scores do not follow from queries and keys is replayed from the scores."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift.instruments.given import ScoreCheck, compare_scores
from kvdrift.pipeline.audit import Audit
from kvdrift.replay.attention import Operands
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import AttentionSpec
from tests.support.own_decoder import (
    SCALE,
    Core,
    audited,
    by_query_head,
    causal,
    first_of,
)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
UNIT = 2.0**-9


def _codes(audit: Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


def _bias(query: Tensor, keys: Tensor, start: int, *, turned: bool = False) -> Tensor:
    """A bias by distance, as ALiBi has it; with its heads in another order if it is `turned`."""
    slopes = 0.5 ** torch.arange(1, query.shape[1] + 1)
    distance = torch.arange(keys.shape[2]) - torch.arange(start, start + query.shape[2])[:, None]
    bias = (slopes.flip(0) if turned else slopes)[:, None, None] * distance
    return bias.masked_fill(~causal(query, keys, start), -torch.inf).to(query.dtype)


def _by_mask(fault: str = "") -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        at_fault = fault if decoding else ""
        bias = _bias(query, keys, start, turned=at_fault == "slopes")
        scale = SCALE * (1.05 if at_fault == "scale" else 1.0)
        context = F.scaled_dot_product_attention(
            query, by_query_head(keys), by_query_head(values), attn_mask=bias, scale=scale
        )
        return 1.1 * context if at_fault == "context" else context

    return core


def _by_products(fault: str = "", cap: float | None = None) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        at_fault = fault if decoding else ""
        scores = query @ by_query_head(keys).mT * (SCALE * (1.05 if at_fault == "scale" else 1.0))
        if cap is not None and at_fault != "cap":
            scores = cap * torch.tanh(scores / cap)
        elif cap is None:
            scores = scores + _bias(query, keys, start, turned=at_fault == "slopes")
        probs = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        context = torch.matmul(probs, by_query_head(values))
        return 1.1 * context if at_fault == "context" else context

    return core


def _in_a_window(size: int, of_decode: int) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        places = torch.arange(start, start + query.shape[2])[:, None] - torch.arange(keys.shape[2])
        seen = causal(query, keys, start) & (places < (of_decode if decoding else size))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=seen, enable_gqa=True)

    return core


def _without_ladder(core: Core, at: int = 0) -> Audit:
    return audited(core, torch.bfloat16, at=at, ladder="off")


@pytest.mark.parametrize("written", [_by_mask, _by_products])
def test_a_bias_by_position_is_no_reason_not_to_decide(written: Callable[[str], Core]) -> None:
    audit = _without_ladder(written(""))

    assert audit.verdict in PASSES
    assert "GIVEN_SCORES" in _codes(audit)


@pytest.mark.parametrize(
    ("fault", "site"), [("slopes", "attn_scores"), ("scale", "attn_scores"), ("context", "attn_ctx")]
)
@pytest.mark.parametrize("written", [_by_mask, _by_products])
def test_a_fault_beside_a_bias_is_found(written: Callable[[str], Core], fault: str, site: str) -> None:
    audit = _without_ladder(written(fault), at=1)

    assert (audit.verdict, first_of(audit)) == (Verdict.MISMATCH, (1, site))


def test_scores_under_a_cap_are_replayed_and_a_lost_cap_is_found() -> None:
    clean, faulty = (_without_ladder(_by_products(fault, cap=2.0), at=1) for fault in ("", "cap"))

    assert clean.verdict in PASSES
    assert "GIVEN_SCORES" in _codes(clean)
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_scores"))


def test_a_window_that_only_the_mask_knows_is_replayed_and_one_that_is_shorter_is_found() -> None:
    clean, faulty = (_without_ladder(_in_a_window(5, size), at=1) for size in (5, 4))

    assert clean.verdict in PASSES
    assert "GIVEN_SCORES" not in _codes(clean)
    assert (faulty.verdict, first_of(faulty)) == (Verdict.MISMATCH, (1, "attn_scores"))


def test_one_layer_that_is_not_replayed_is_one_too_few() -> None:
    """The others do not speak for it: a fault of its cache is seen nowhere else."""

    def by_hand(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = (query[..., None, :] * by_query_head(keys)[:, :, None]).sum(-1) * SCALE
        weights = torch.exp(scores.masked_fill(~causal(query, keys, start), -torch.inf))
        return ((weights / weights.sum(-1, keepdim=True))[..., None] * by_query_head(values)[:, :, None]).sum(-2)

    audit = _without_ladder(by_hand, at=1)

    assert audit.verdict is Verdict.INCONCLUSIVE
    assert "layer 1: what its attention reads was not seen" in audit.view["hypotheses"]["conclusion"]


def _compared(of_prefill: float, of_decode: float, moved: float) -> ScoreCheck | str:
    """Scores with biases of these factors, of operands that differ a little."""
    rng = np.random.default_rng(3)
    query, keys, bias = rng.normal(size=(4, 8)), rng.normal(size=(12, 2, 8)), 0.3 * rng.normal(size=(4, 12))
    found = []
    for factor, shift in ((of_prefill, 0.0), (of_decode, moved)):
        moved_query = query * (1.0 + shift * rng.normal(size=query.shape))
        raw = np.einsum("hd,shd->hs", moved_query, keys.repeat(2, axis=1)) * SCALE
        scores = raw + factor * bias + UNIT * np.abs(raw) * rng.uniform(-1, 1, size=raw.shape)
        spec = AttentionSpec(SCALE)
        found.append(Operands(moved_query, keys, np.zeros((12, 2, 8)), np.arange(12), 11, spec, scores=scores))
    return compare_scores(found[0], found[1], UNIT)


def test_the_same_bias_is_not_told_from_operands_that_differ_and_another_one_is() -> None:
    for moved in (0.0, 4 * UNIT):
        same, other = _compared(1.0, 1.0, moved), _compared(1.0, 1.5, moved)
        assert isinstance(same, ScoreCheck)
        assert isinstance(other, ScoreCheck)
        assert same.over < 1.0 < other.over
