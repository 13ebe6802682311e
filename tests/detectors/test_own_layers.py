"""Layers for packed weights of somebody's own: exact products measure what they multiply by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.linear import UnknownWeight
from kvdrift.engines.torch.unit_rows import may_be_product, measured_product, require_product
from kvdrift.trace.model import MEASURED
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.models.tiny import lively_model
from tests.support.packed import KINDS, Activations, Groups, Packed, Rows, replaced

# An audit takes about a second.
_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (14, 18, 23)}
FAULTY = "layers.1.mlp.down_proj"


def audited(kind: type[Packed], faulty: str | None = None, ladder: Any = "off") -> Any:
    model = replaced(lively_model("llama", torch.bfloat16), lambda old, name: kind(old, name == faulty))
    return kvdrift.audit(model, prompts=PROMPTS, span=3, ladder=ladder, mode="kv_aligned")


def products(audit: Any) -> Any:
    return next(item for item in audit.evidence if item.instrument == "products")


@pytest.mark.parametrize(
    ("kind", "ladder"),
    [
        (Rows, "off"),
        (Groups, "off"),
        *(pytest.param(kind, "off", marks=pytest.mark.matrix) for kind in KINDS if kind not in (Rows, Groups)),
        *(pytest.param(kind, "model", marks=pytest.mark.matrix) for kind in KINDS),
    ],
)
def test_a_layer_that_takes_other_scales_for_one_token_is_found(kind: type[Packed], ladder: Any) -> None:
    audit = audited(kind, FAULTY, ladder)

    assert audit.verdict is Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "mlp_out")
    assert products(audit).statistic > 5.0
    assert products(audit).detail["guilty"] is None, "the reference came out of the module itself"


@pytest.mark.parametrize(
    ("kind", "ladder"),
    [
        (Rows, "off"),
        (Activations, "off"),
        *(pytest.param(kind, "off", marks=pytest.mark.matrix) for kind in KINDS if kind not in (Rows, Activations)),
        *(pytest.param(kind, "model", marks=pytest.mark.matrix) for kind in KINDS),
    ],
)
def test_right_layers_pass_and_are_named(kind: type[Packed], ladder: Any) -> None:
    audit = audited(kind, ladder=ladder)

    assert audit.exit_code == 0, audit.verdict
    seen = products(audit)
    assert seen.statistic < 0.6
    assert seen.detail["n_products"] == 22
    assert MEASURED in seen.text


class Fused(Rows):
    """A fused projection that puts one token's results eight places further."""

    def multiply(self, x: Tensor, shift: int) -> Tensor:
        return super().multiply(x, 0).roll(8 * shift, -1)


@pytest.mark.parametrize("is_faulty", [True, False])
def test_a_fused_projection_that_cuts_otherwise_for_one_token_is_found(is_faulty: bool) -> None:
    model = lively_model("phi3", torch.bfloat16)
    attention = model.model.layers[1].self_attn
    attention.qkv_proj = Fused(attention.qkv_proj, is_faulty)

    audit = kvdrift.audit(model, prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")

    assert (audit.verdict is Verdict.MISMATCH) == is_faulty
    if is_faulty:
        assert (audit.first_failure.layer, audit.first_failure.site) == (1, "q_proj")  # type: ignore[union-attr]


# ------------------------------------------------------------------------------------------------- the measurement


def linear(bias: float = 0.0) -> nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        found = nn.Linear(300, 24, dtype=torch.bfloat16)
        found.bias.data.fill_(bias)
    return found


def rows(n: int = 6) -> Tensor:
    return torch.randn(n, 300, generator=torch.Generator().manual_seed(2)).bfloat16()


@pytest.mark.parametrize("bias", [0.0, 3.0, 1000.0])
def test_unit_rows_give_the_matrix_beside_any_bias(bias: float) -> None:
    module, x = linear(bias), rows()
    reference, spread = measured_product(module, x, 3)
    exact = x.double() @ module.weight.double().T + bias
    squares = x.double().square() @ module.weight.double().T.square() + bias**2
    # A weight is known to a rounding of itself beside a 64th of one of the bias.
    assert torch.allclose(reference, exact, atol=2.0**-8 * float(spread.max()) if bias else 1e-12, rtol=0)
    assert torch.allclose(spread, squares.sqrt(), rtol=0.02)


def test_what_is_no_product_is_refused() -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(linear().weight.data)

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.silu(x @ self.weight.T)

    module, x = Gated(), rows()
    assert may_be_product(module)
    reference, spread = measured_product(module, x, 2)
    with pytest.raises(UnknownWeight, match="not a product"):
        require_product(module(x), reference, spread)
    packed = Activations(linear())
    require_product(packed(x[None])[0], *measured_product(packed, x, 3))
    with pytest.raises(UnknownWeight, match="it fails on unit rows, with a ValueError"):
        measured_product(_Failing(), x, 2)
    assert not may_be_product(nn.RMSNorm(8))


class _Failing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise ValueError
