"""A scale that one pass holds in its queries or keys: no fault; one that changes the scores is found."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from tests.support.matrix import further
from tests.support.own_decoder import HEADS, SCALE, Core, audited, by_query_head, causal, plain

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
# A scale of no round number, as that of heads of 128 elements: queries that hold it are rounded once more.
ODD = SCALE * 1.0625


def attended(of_queries: float | Tensor, of_keys: float, of_scores: float) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = (query * of_queries) @ (by_query_head(keys) * of_keys).mT * of_scores
        weights = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1, dtype=torch.float32)
        return weights.to(query.dtype) @ by_query_head(values)

    return core


def in_decode(prefill: Core, decode: Core) -> Core:
    return lambda query, keys, values, start, decoding: (decode if decoding else prefill)(
        query, keys, values, start, decoding
    )


def codes(audit: kvdrift.Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


BEHIND = attended(1.0, 1.0, ODD)


@pytest.mark.parametrize(
    ("core", "dtype", "ladder"),
    [
        (in_decode(BEHIND, attended(ODD, 1.0, 1.0)), torch.float32, "model"),
        (in_decode(BEHIND, attended(ODD, 1.0, 1.0)), torch.bfloat16, "off"),
        *further(
            (in_decode(attended(ODD, 1.0, 1.0), BEHIND), torch.bfloat16, "model"),
            (in_decode(BEHIND, attended(math.sqrt(ODD), math.sqrt(ODD), 1.0)), torch.float16, "model"),
            (in_decode(plain, attended(SCALE, 1.0, 1.0)), torch.bfloat16, "model"),
        ),
    ],
)
def test_a_scale_in_queries_or_keys_of_one_pass_is_no_fault(core: Core, dtype: torch.dtype, ladder: str) -> None:
    audit = audited(core, dtype, at=0, ladder=ladder)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)
    assert "SCALE_IN_OPERANDS" in codes(audit)


TEMPERATURES = torch.tensor([0.6, 1.3, 1.0, 0.85])[:, None, None]


def tempered(of_queries: Tensor | float, of_scores: Tensor | float) -> Core:
    """Attention whose heads have a temperature, in the queries or behind the products."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        wide = torch.promote_types(query.dtype, torch.float32)
        at_head = [torch.as_tensor(factor).to(query.dtype) for factor in (of_queries, of_scores)]
        scores = (query * at_head[0]).to(wide) @ by_query_head(keys).to(wide).mT * SCALE * at_head[1].to(wide)
        weights = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        context: Tensor = weights @ by_query_head(values).to(wide)
        return context.to(query.dtype)

    return core


@pytest.mark.parametrize(
    ("dtype", "ladder"), [(torch.float32, "model"), *further((torch.bfloat16, "off"), (torch.float16, "model"))]
)
def test_a_temperature_of_each_head_may_stand_in_the_queries(dtype: torch.dtype, ladder: str) -> None:
    core = in_decode(tempered(1.0, TEMPERATURES), tempered(TEMPERATURES, 1.0))
    audit = audited(core, dtype, at=0, ladder=ladder)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)
    assert "SCALE_IN_OPERANDS" in codes(audit)


ONE_MORE = torch.where(torch.arange(HEADS) == 1, 1.02, 1.0)[:, None, None]


@pytest.mark.parametrize(
    ("decode", "dtype", "ladder"),
    [
        pytest.param(tempered(TEMPERATURES * ONE_MORE, 1.0), torch.float32, "model", id="one head by 2 % more"),
        pytest.param(tempered(TEMPERATURES, ONE_MORE), torch.float32, "model", id="one head by 2 % more behind"),
        pytest.param(tempered(TEMPERATURES.roll(1, 0), 1.0), torch.bfloat16, "off", id="those of other heads"),
        *further(
            (tempered(TEMPERATURES, TEMPERATURES), torch.float32, "model"),
            (tempered(TEMPERATURES * 1.05, 1.0), torch.bfloat16, "off"),
            (tempered(TEMPERATURES * ONE_MORE, 1.0), torch.bfloat16, "model"),
        ),
    ],
)
def test_a_temperature_that_changes_scores_is_found(decode: Core, dtype: torch.dtype, ladder: str) -> None:
    audit = audited(in_decode(tempered(1.0, TEMPERATURES), decode), dtype, ladder=ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 1


def test_a_fault_of_such_a_scale_is_found_without_the_ladder() -> None:
    audit = audited(in_decode(plain, attended(SCALE, 1.0, 1.05)), torch.bfloat16, ladder="off")

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "attn_ctx")


ONE_HEAD = torch.where(torch.arange(HEADS) == 1, 1.02, 1.0)[:, None, None]


@pytest.mark.parametrize(
    ("decode", "dtype", "ladder", "site"),
    [
        pytest.param(attended(ODD, 1.0, ODD), torch.float32, "model", "q_rope", id="twice"),
        pytest.param(attended(ODD, 1.0, 1.001), torch.float32, "model", "attn_scores", id="a thousandth more"),
        *further(
            (attended(ODD * ONE_HEAD, 1.0, 1.0), torch.float32, "model", "q_rope"),
            (attended(math.sqrt(ODD), ODD, 1.0), torch.float32, "model", "q_rope"),
            (attended(1.0, ODD, ODD), torch.float32, "model", "k_cache"),
        ),
    ],
)
def test_a_fault_of_such_a_scale_is_found(decode: Core, dtype: torch.dtype, ladder: str, site: str) -> None:
    audit = audited(in_decode(BEHIND, decode), dtype, ladder=ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, site)
