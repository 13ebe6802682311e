"""A cache of integers whose scales multiply scores and probabilities: right ones pass, and a wrong scale is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.matrix import further
from tests.support.own_decoder import SCALE, Core, audited, by_query_head, causal

KEYS, VALUES = "keys", "values"


def codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 8 bits, and the scale of each row [1, kv head, key, 1], as both passes know them."""
    wide = rows if rows.dtype == torch.float64 else rows.float()
    scale = wide.abs().amax(-1, keepdim=True) / 127.0
    return torch.round(wide / scale), scale


def behind(fault: str | None = None, held: tuple[str, ...] = (KEYS, VALUES), *, at_16_bits: bool = False) -> Core:
    """Attention to rows of 8 bits; decode takes those that are `held` as integers, and their scales behind."""

    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        sides = {KEYS: codes(keys), VALUES: codes(values)}
        if decoding and not (at_16_bits and query.dtype == torch.float64):
            _commit(fault, sides)
        given, scales = {}, {}
        for name, (integers, scale) in sides.items():
            is_held = decoding and name in held
            given[name] = integers if is_held else (integers * scale).to(keys.dtype).to(integers.dtype)
            scales[name] = scale if is_held else torch.ones_like(scale)
        products = query.to(scales[KEYS].dtype) @ by_query_head(given[KEYS]).mT
        scores = products * by_query_head(scales[KEYS]).mT * SCALE
        weights = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        return torch.matmul(weights * by_query_head(scales[VALUES]).mT, by_query_head(given[VALUES])).to(query.dtype)

    return core


def _commit(fault: str | None, sides: dict[str, Any]) -> None:
    (k, k_scale), (v, v_scale) = sides[KEYS], sides[VALUES]
    if fault == "scale of the next key":
        k_scale = k_scale.roll(1, dims=2)
    if fault == "scale of the other head":
        v_scale = v_scale.flip(1)
    if fault in ("one key by a twentieth more", "one key by a fourth more"):
        factor = 1.05 if "twentieth" in fault else 1.25
        k_scale = torch.cat([k_scale[:, :, :3], k_scale[:, :, 3:4] * factor, k_scale[:, :, 4:]], dim=2)
    if fault == "integers of one value":
        v = torch.cat([v[:, :, :3], v[:, :, 3:4] + 3.0, v[:, :, 4:]], dim=2)
    sides[KEYS], sides[VALUES] = (k, k_scale), (v, v_scale)


def codes_of(audit: Audit) -> set[str]:
    return {caveat.code for caveat in audit.caveats}


@pytest.mark.parametrize(
    ("held", "dtype", "ladder"),
    [
        ((KEYS, VALUES), torch.bfloat16, "model"),
        *further(
            ((KEYS,), torch.bfloat16, "model"),
            ((VALUES,), torch.bfloat16, "model"),
            ((KEYS, VALUES), torch.float32, "model"),
            ((KEYS, VALUES), torch.bfloat16, "off"),
        ),
    ],
)
def test_scales_behind_products_pass(held: tuple[str, ...], dtype: torch.dtype, ladder: str) -> None:
    audit = audited(behind(None, held), dtype, ladder=ladder)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)
    assert "SCALES_BEHIND" in codes_of(audit)


def test_where_they_stand_in_the_rows_nothing_is_said_of_them() -> None:
    audit = audited(behind(None, ()), torch.bfloat16)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
    assert "SCALES_BEHIND" not in codes_of(audit)


@pytest.mark.parametrize(
    ("fault", "sites"),
    [
        ("scale of the next key", {Site.K_CACHE, Site.ATTN_SCORES}),
        *further(
            ("scale of the other head", {Site.V_CACHE, Site.ATTN_CTX}),
            ("one key by a twentieth more", {Site.K_CACHE, Site.ATTN_SCORES, Site.ATTN_CTX}),
        ),
        ("integers of one value", {Site.V_CACHE}),
    ],
)
@pytest.mark.parametrize("at_16_bits", [True, pytest.param(False, marks=pytest.mark.matrix)])
def test_a_wrong_one_is_found(fault: str, sites: set[Site], at_16_bits: bool) -> None:
    """At 16 bits alone, too, where rows that were divided have no bits that prove anything."""
    if at_16_bits and fault == "one key by a twentieth more":
        fault = "one key by a fourth more"  # replay sees it there, whose minimum is larger
    audit = audited(behind(fault, at_16_bits=at_16_bits), torch.bfloat16)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert audit.first_failure.layer == 1
    assert audit.first_failure.site in sites
