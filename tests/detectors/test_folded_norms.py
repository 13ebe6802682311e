"""Weights of a norm that decode multiplies into the matrices behind it are no fault; wrong ones are, where they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.refolded import refolded
from kvdrift.pairing.gains import gains_of
from kvdrift.trace.model import RowRecord
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from tests.support.own_decoder import (
    PROMPTS,
    WIDTH,
    Attention,
    Decoder,
    Layer,
    RMSNorm,
    engine,
    first_of,
)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)
AUDITS: list[tuple[torch.dtype, Literal["model", "off"]]] = [
    (torch.float32, "model"),
    (torch.bfloat16, "model"),
    (torch.bfloat16, "off"),
]
Wrong = Callable[[str, Tensor], Tensor]  # of the name of a projection and its gains


def _right(name: str, gain: Tensor) -> Tensor:
    return gain


def _query_too_large(name: str, gain: Tensor) -> Tensor:
    return gain * 1.05 if name == "q_proj" else gain


def _one_feature_of_values(name: str, gain: Tensor) -> Tensor:
    if name != "v_proj":
        return gain
    gain = gain.clone()
    gain[5] *= 1.3
    return gain


class _Linear(nn.Linear):
    """A product whose weight holds the gains of a norm while `gain` gives some."""

    gain: tuple[Tensor, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * self.gain[0] if self.gain else self.weight)


class _Norm(RMSNorm):
    """A norm that gives rows without its weights while it is `bare`."""

    def __init__(self) -> None:
        super().__init__()
        self.bare = False

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, (WIDTH,), None if self.bare else self.weight, 1e-6)


class _Folding(Layer):
    """Multiplies the gains of the norm in front of attention into its projections in decode; in layer 1 those that are
    `wrong`. The norm itself is called with `calls_norm`, and gives rows without them."""

    wrong: Wrong = staticmethod(_right)
    calls_norm = True

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm = self.own = _Norm()
        for name in ("q_proj", "k_proj", "v_proj"):
            made = getattr(self.attention, name)
            setattr(self.attention, name, _Linear(made.in_features, made.out_features, bias=False))

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        decoding = x.shape[1] == 1 and start > 0
        self.own.bare = decoding
        for name in ("q_proj", "k_proj", "v_proj"):
            gain = self.wrong(name, self.norm.weight) if self.attention.number == 1 else self.norm.weight
            getattr(self.attention, name).gain = (gain,) if decoding else ()
        given = self.norm(x) if self.calls_norm or not decoding else F.rms_norm(x, (WIDTH,), None, 1e-6)
        x = x + self.attention(given, cache, start)
        return torch.add(x, self.mlp(self.mlp_norm(x)))


def _layers(wrong: Wrong, calls_norm: bool) -> list[Layer]:
    kind = type("Folding", (_Folding,), {"wrong": staticmethod(wrong), "calls_norm": calls_norm})
    return [kind(n) for n in range(2)]


def _audited(model: nn.Module, dtype: torch.dtype, ladder: Literal["model", "off"]) -> Any:
    return kvdrift.audit(engine(model, dtype), prompts=PROMPTS, span=2, ladder=ladder)


@pytest.mark.parametrize(("dtype", "ladder"), AUDITS)
def test_a_norm_without_its_gains_is_not_a_fault_where_the_products_behind_hold_them(
    dtype: torch.dtype, ladder: Literal["model", "off"]
) -> None:
    audit = _audited(Decoder(_layers(_right, calls_norm=True)), dtype, ladder)

    assert audit.verdict in PASSES, (audit.first_failure, audit.decision.reasons)
    assert "GAIN_IN_WEIGHTS" in {item["code"] for item in audit.view["caveats"]}


@pytest.mark.parametrize(("dtype", "ladder"), AUDITS)
@pytest.mark.parametrize("wrong", [_query_too_large, _one_feature_of_values])
def test_gains_that_are_wrong_in_one_product_are_a_mismatch(
    dtype: torch.dtype, ladder: Literal["model", "off"], wrong: Wrong
) -> None:
    audit = _audited(Decoder(_layers(wrong, calls_norm=True)), dtype, ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert first_of(audit) in [(1, "attn_norm_out"), (1, "q_proj"), (1, "v_proj")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_product_that_holds_the_gains_of_a_norm_follows_from_them(dtype: torch.dtype) -> None:
    """Nothing shows the norm in decode; its products are what the module makes of rows without gains."""
    clean = _audited(Decoder(_layers(_right, calls_norm=False)), dtype, "model")
    large = _audited(Decoder(_layers(_query_too_large, calls_norm=False)), dtype, "model")
    one = _audited(Decoder(_layers(_one_feature_of_values, calls_norm=False)), dtype, "model")

    assert clean.verdict in PASSES, (clean.first_failure, clean.decision.reasons)
    assert (large.verdict, first_of(large)) == (Verdict.MISMATCH, (1, "q_proj"))
    assert (one.verdict, first_of(one)) == (Verdict.MISMATCH, (1, "v_proj"))


class _FoldedAttention(Attention):
    """Keeps a matrix that holds the gains of its norm, rounded to the model's own dtype, and reads it in decode."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.folded = nn.Parameter(torch.zeros(sum(each.out_features for each in self.made), WIDTH))

    @property
    def made(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def fold(self, gain: Tensor) -> None:
        with torch.no_grad():
            self.folded.copy_(torch.cat([each.weight * gain for each in self.made]))

    def projected(self, x: Tensor, decoding: bool) -> Sequence[Tensor]:
        if not decoding:
            return super().projected(x, decoding)
        return torch.split(F.linear(x, self.folded), [each.out_features for each in self.made], -1)


class _Folded(Layer):
    """Gives its attention rows without the gains of the norm in decode."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.attention = self.kept = _FoldedAttention(number)

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        decoding = x.shape[1] == 1 and start > 0
        given = F.rms_norm(x, (WIDTH,), None, 1e-6) if decoding else self.norm(x)
        x = x + self.attention(given, cache, start)
        return torch.add(x, self.mlp(self.mlp_norm(x)))


def _folded(dtype: torch.dtype, gain_of: Callable[[list[_Folded]], Tensor]) -> Any:
    layers = [_Folded(n) for n in range(2)]
    made = engine(Decoder(layers), dtype)
    for layer in layers:
        layer.kept.fold(layer.norm.weight if layer.kept.number == 0 else gain_of(layers))
    return kvdrift.audit(made, prompts=PROMPTS, span=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_matrices_that_hold_rounded_gains_are_computed_anew_at_float64(dtype: torch.dtype) -> None:
    clean = _folded(dtype, lambda layers: layers[1].norm.weight)
    other = _folded(dtype, lambda layers: layers[0].norm.weight)
    large = _folded(dtype, lambda layers: layers[1].norm.weight * 1.02)

    assert clean.verdict in PASSES, (clean.first_failure, clean.decision.reasons)
    assert (other.verdict, first_of(other)) == (Verdict.MISMATCH, (1, "q_rope"))
    assert (large.verdict, first_of(large)) == (Verdict.MISMATCH, (1, "q_rope"))


def test_only_the_bits_of_a_product_are_taken_for_one() -> None:
    attention, norm = _FoldedAttention(0).bfloat16(), nn.RMSNorm(WIDTH).bfloat16()
    with torch.no_grad():
        norm.weight.copy_(1.0 + 0.3 * torch.randn(WIDTH))
    attention.fold(norm.weight)
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleList([attention, norm])])})

    found = refolded(model, torch.float64)
    assert set(found) == {id(attention.folded)}
    weights = torch.cat([each.weight for each in attention.made])
    assert torch.equal(found[id(attention.folded)], weights.double() * norm.weight.double())

    with torch.no_grad():
        attention.folded[3, 5] *= 1.01
    assert not refolded(model, torch.float64)


def _pass(rows: dict[Site, np.ndarray[Any, Any]]) -> Any:
    class Recorded:
        def __init__(self) -> None:
            self.rows = [RowRecord(0, site, (4, 5, 6), values, None) for site, values in rows.items()]

    return Recorded()


def test_rows_that_are_no_norm_without_gains_stay_as_they_are() -> None:
    draw = np.random.default_rng(1)
    bare = draw.normal(size=(3, 64))
    bare /= np.sqrt(np.mean(bare**2, 1, keepdims=True))
    gain = 1.0 + 0.3 * draw.normal(size=64)
    behind = {site: draw.normal(size=(3, 8)) for site in (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ)}
    prefill = _pass({Site.ATTN_NORM_OUT: bare * gain, **behind})
    place = (0, Site.ATTN_NORM_OUT)

    found = gains_of(prefill, _pass({Site.ATTN_NORM_OUT: bare, **behind}), (4, 5, 6), {})
    np.testing.assert_allclose(found[place], gain, rtol=1e-12)
    # Rows that are too large by a twentieth as well, rows of which one is another, and products that change.
    other = bare.copy()
    other[1] = bare[0]
    changed = behind | {Site.V_PROJ: behind[Site.V_PROJ] * 1.1}
    for rows, products in ((1.05 * bare, behind), (other, behind), (bare, changed)):
        assert not gains_of(prefill, _pass({Site.ATTN_NORM_OUT: rows, **products}), (4, 5, 6), {})
    # One position has such factors in any case: those that are known count.
    one = _pass({Site.ATTN_NORM_OUT: bare, **behind})
    assert not gains_of(prefill, one, (5,), {})
    assert place in gains_of(prefill, one, (5,), {place: gain})
