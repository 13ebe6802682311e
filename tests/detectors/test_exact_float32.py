"""Products of float32 models against float64: faults that exist in float32 alone, and kernels that add term by term."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift_bench.models.tiny import lively_model

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]}
Product = Callable[[Any, Tensor], Tensor]


@contextmanager
def in_decode(module: nn.Module, product: Product) -> Iterator[None]:
    """Let a module compute single rows of float32 by another product."""
    forward = module.forward
    module.forward = lambda x: product(module, x) if x.shape[-2] == 1 and x.dtype == torch.float32 else forward(x)
    try:
        yield
    finally:
        module.forward = forward


def off_in_one_logit(module: Any, x: Tensor) -> Tensor:
    y = nn.functional.linear(x, module.weight)
    y[..., 5] *= 1.0 + 1e-5
    return y


def by_ten_bits(module: Any, x: Tensor) -> Tensor:
    """Operands keep 10 bits of their mantissas, sums are float32 (TF32)."""
    first, second = ((t.view(torch.int32) & -(1 << 13)).view(torch.float32) for t in (x, module.weight.detach()))
    return nn.functional.linear(first, second)


def term_by_term(module: Any, x: Tensor) -> Tensor:
    total = torch.zeros(*x.shape[:-1], module.weight.shape[0])
    for term in range(x.shape[-1]):
        total = total + x[..., term : term + 1] * module.weight[:, term]
    return total


def seen(audit: Any) -> Any:
    return next(item for item in audit.evidence if item.instrument == "products" and item.mode == "kv_aligned")


@pytest.mark.parametrize(
    ("product", "kind", "ladder"), [(off_in_one_logit, None, "off"), (by_ten_bits, "precision", "model")]
)
def test_what_is_off_in_float32_alone_is_found(product: Product, kind: str | None, ladder: Any) -> None:
    model = lively_model("llama", torch.float32)
    with in_decode(model.lm_head, product):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2, ladder=ladder)

    assert (audit.verdict, audit.kind) == (kvdrift.Verdict.MISMATCH, kind)
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (None, "logits")
    assert seen(audit).detail["guilty"] == "decode"


def test_sums_of_one_term_after_the_other_are_right() -> None:
    model = lively_model("llama", torch.float32)
    with in_decode(model.lm_head, term_by_term), in_decode(model.model.layers[1].mlp.down_proj, term_by_term):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is kvdrift.Verdict.STRUCTURAL_DRIFT, audit.first_failure
    assert 0.2 < seen(audit).statistic < 0.8
    assert seen(audit).minimum_detectable < 2e-6
