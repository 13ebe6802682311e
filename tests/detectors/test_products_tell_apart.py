"""What exact products tell: that a row in front of a product is wrong, and nothing of errors that they do not see."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.vocabulary.causes import Cause
from tests.support.own_decoder import PROMPTS, Behind, Decoder, Layer, audited, engine, plain

PASSES = (kvdrift.Verdict.EXACT, kvdrift.Verdict.STRUCTURAL_DRIFT)


def _gate(wrong: bool) -> Behind:
    """A gate of each element of the context, in front of the output projection."""

    def behind(context: Tensor, x: Tensor, decoding: bool) -> Tensor:
        gate = torch.cat([x, -x], dim=-1)[..., : context.shape[-1]]
        return context * (F.silu(gate) if wrong and decoding else torch.sigmoid(gate))

    return behind


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.matrix)])
def test_a_gate_in_front_of_the_output_projection_is_told_by_the_projection(dtype: torch.dtype) -> None:
    audit = audited(plain, dtype, behind=_gate(True))

    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert str(audit.first_failure).endswith("layer 1 / attn_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause is Cause.OPERAND_WRONG, audit.diagnosis
    assert "between attn_ctx, which agrees, and it" in audit.diagnosis.text


def test_the_right_gate_passes() -> None:
    assert audited(plain, behind=_gate(False)).verdict in PASSES


class _Off(nn.Linear):
    """A product that is off by a share of its size in decode steps, in directions of its own."""

    share = 0.0

    def forward(self, x: Tensor) -> Tensor:
        right: Tensor = super().forward(x)
        if x.shape[1] > 1 or not self.share:
            return right
        draw = torch.randn(self.weight.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        wrong = x.double() @ draw.T
        moved: Tensor = right.double() + self.share * right.double().norm() / wrong.norm() * wrong
        return moved.to(right.dtype)


def _audited(share: float, dtype: torch.dtype) -> Any:
    layers = [Layer(0), Layer(1)]
    for layer in layers:
        off = _Off(64, 32)
        off.share = share if layer is layers[1] else 0.0
        layer.mlp[2] = off
    return kvdrift.audit(engine(Decoder(layers), dtype), prompts=PROMPTS, span=2)


@pytest.mark.parametrize(
    ("share", "dtype", "causes"),
    [
        (1e-3, torch.bfloat16, (Cause.UNEXPLAINED,)),
        (0.2, torch.bfloat16, (Cause.PRODUCT_WRONG,)),
        (1e-3, torch.float32, (Cause.PRODUCT_WRONG,)),
    ],
)
def test_products_that_would_not_show_an_error_are_not_called_right(
    share: float, dtype: torch.dtype, causes: tuple[Cause, ...]
) -> None:
    """An error below what the native dtype shows of a product may be that of the product."""
    audit = _audited(share, dtype)

    assert str(audit.first_failure).endswith("layer 1 / mlp_out")
    assert audit.diagnosis is not None
    assert audit.diagnosis.cause in causes, audit.diagnosis
