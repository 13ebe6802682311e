"""Products of float32 models against float64: faults that exist in float32 alone, and kernels that add term by term."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.linear import exact_product, of_partial_sums
from kvdrift.instruments.exact import LEAST, measure_errors
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


def test_sums_in_which_few_results_or_terms_outweigh_the_others_are_right() -> None:
    """Rows whose outliers make the whole error, as in trained models, stray further than rows of like results."""
    torch.manual_seed(0)
    largest = 0.0
    for _ in range(10):
        module = nn.Linear(64, 64, bias=False)
        module.weight = nn.Parameter(torch.randn(64, 64) * torch.randn(64, 1).exp(), requires_grad=False)
        x = torch.randn(200, 64) * torch.randn(200, 64).exp()
        reference, spread = exact_product(module, x)
        wide = of_partial_sums(reference, spread, 64).numpy()
        errors = measure_errors(term_by_term(module, x).numpy(), reference.numpy(), wide, "float32", 2.0**-24)
        largest = max(largest, errors.row.max() / LEAST.row, errors.block.max() / LEAST.block)

    assert 0.3 < largest < 0.9, "a bound that nothing comes near would see nothing"


def test_the_first_term_may_be_the_largest() -> None:
    """All partial sums are then as large as the result, and just above a power of two they round the most."""
    torch.manual_seed(0)
    x, weight = torch.randn(40, 64), 0.001 * torch.randn(64, 64)
    x[:, 0], weight[:, 0] = 8.0, 0.127
    module = nn.Linear(64, 64, bias=False)
    module.weight = nn.Parameter(weight, requires_grad=False)
    reference, spread = exact_product(module, x)
    wide = of_partial_sums(reference, spread, 64).numpy()

    errors = measure_errors(term_by_term(module, x).numpy(), reference.numpy(), wide, "float32", 2.0**-24)

    assert 0.6 < errors.row.max() < 1.0
