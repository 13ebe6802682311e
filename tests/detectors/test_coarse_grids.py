"""What both passes round to a coarse grid: noise that hides nothing, and a fault behind it that is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.vocabulary.evidence import Verdict
from tests.support.own_decoder import PROMPTS, SCALE, Core, Decoder, Layer, by_query_head, causal, engine


class Float8(nn.Module):
    """A product of weights and activations in float8, by scales that were fixed before (float32 sums)."""

    def __init__(self, right: Any, factor: float = 1.0) -> None:
        super().__init__()
        self.weight, self.factor = nn.Parameter(torch.zeros(right.out_features, right.in_features)), factor

    def forward(self, x: Tensor) -> Tensor:
        rows, weight = ((each * 32.0).clamp(-448, 448).to(torch.float8_e4m3fn).float() for each in (x, self.weight))
        result: Tensor = (rows @ weight.T) / 1024.0 * (self.factor if x.shape[1] == 1 else 1.0)
        return result.to(x.dtype)


def with_float8(factor: float) -> kvdrift.TorchEngine:
    layers = [Layer(0), Layer(1)]
    for layer in layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.attention, name, Float8(getattr(layer.attention, name)))
        layer.mlp[0] = Float8(layer.mlp[0])
        layer.mlp[2] = Float8(layer.mlp[2], factor if layer is layers[1] else 1.0)
    return engine(Decoder(layers))


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.2, False)])
def test_activations_by_a_fixed_scale(factor: float, passes: bool) -> None:
    audit = kvdrift.audit(with_float8(factor), prompts=PROMPTS, span=2)

    assert (audit.exit_code == 0) is passes, (audit.first_failure, audit.decision.reasons)
    if not passes:
        assert audit.verdict is Verdict.MISMATCH
        assert audit.first_failure is not None
        assert audit.first_failure.layer == 1


def by_rounded_values(factor: float) -> Core:
    def core(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
        scores = query @ by_query_head(keys).mT * SCALE
        weights = scores.masked_fill(~causal(query, keys, start), -torch.inf).softmax(-1)
        narrow = by_query_head(values).to(torch.float16).float() * (factor if decoding else 1.0)
        return torch.matmul(weights.to(torch.float16).float(), narrow).to(query.dtype)

    return core


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.05, False)])
def test_values_in_float16_in_both_passes_of_a_float32_model(factor: float, passes: bool) -> None:
    prompts = {f"p{n}": [(7 * i + n) % 61 + 2 for i in range(n)] for n in (11, 17, 26)}
    audit = kvdrift.audit(
        engine(Decoder([Layer(n, by_rounded_values(factor)) for n in range(2)])), prompts=prompts, span=3
    )

    assert (audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)) is passes, audit.first_failure
    assert passes or audit.verdict is Verdict.MISMATCH
