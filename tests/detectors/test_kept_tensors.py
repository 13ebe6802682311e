"""Code that keeps tensors for itself at a dtype that the float64 run of the ladder knows nothing of."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import kvdrift
from kvdrift.engines.torch.alike import made_alike
from kvdrift.engines.torch.attention import AttentionTap
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site
from kvdrift.zoo.build import build
from kvdrift_bench.models.tiny import lively_model
from tests.support.matrix import further

PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12, 71, 23], "q": [99, 23, 4, 50, 66, 91, 2, 17, 18, 3]}


@contextmanager
def own_weights(
    module: Any, factor: float = 1.0, *, both: bool = False, dtype: torch.dtype = torch.float32
) -> Iterator[None]:
    """Let a product of decode, or of both passes, use weights of its own, which no module holds."""
    weight, forward = module.weight.detach().to(dtype) * factor, module.forward

    def product(x: Tensor) -> Tensor:
        if not both and x.shape[-2] != 1:
            return forward(x)  # type: ignore[no-any-return]
        return F.linear(x if dtype.itemsize == 2 else x.float(), weight).to(x.dtype)

    module.forward = product
    try:
        yield
    finally:
        del module.forward


@pytest.mark.parametrize(
    ("dtype", "both"), [(torch.bfloat16, False), *further((torch.float16, True), (torch.float32, False))]
)
@pytest.mark.parametrize("place", ["lm_head", *further("model.layers.1.mlp.down_proj")])
def test_weights_that_a_kernel_keeps_in_float32_pass(dtype: torch.dtype, both: bool, place: str) -> None:
    model = lively_model("llama", dtype)
    with own_weights(model.get_submodule(place), both=both):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.matrix)])
def test_so_do_weights_that_it_keeps_at_the_native_dtype(dtype: torch.dtype) -> None:
    model = lively_model("llama", dtype)
    with own_weights(model.model.layers[1].mlp.down_proj, dtype=dtype):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), (audit.first_failure, audit.decision.reasons)


def test_a_fault_of_such_weights_is_found() -> None:
    model = lively_model("llama", torch.bfloat16)
    with own_weights(model.model.layers[1].mlp.down_proj, 1.0 + 1e-4):
        audit = kvdrift.audit(model, prompts=PROMPTS, span=2)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, Site.MLP_OUT)


def test_a_mask_of_the_lowest_number_of_float64_has_a_place() -> None:
    """XGLM makes it by torch.full, without a dtype."""
    audit = kvdrift.audit(build("xglm"), prompts={"p": [5, 9, 17, 3, 44, 2, 8]}, span=2)

    assert audit.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT), audit.decision.reasons


def test_what_is_written_into_float32_stays_there() -> None:
    pool, row, index = torch.zeros(3, 2), torch.ones(1, 2, dtype=torch.float64), torch.tensor([1])

    alike = made_alike(Tensor.index_copy_, (pool, 0, index, row))

    assert alike is not None
    assert alike[0] is pool, "a copy would lose what is written"
    Tensor.index_copy_(*alike)
    assert pool.tolist() == [[0.0, 0.0], [1.0, 1.0], [0.0, 0.0]]


def test_only_tensors_of_both_dtypes_are_made_alike() -> None:
    one, other = torch.ones(2), torch.ones(2, dtype=torch.float64)

    assert made_alike(torch.add, (one, one)) is None
    assert made_alike(torch.add, (other, 2, None)) is None
    found = made_alike(torch.add, (one, other, torch.tensor([1])))
    assert found is not None
    assert [item.dtype for item in found] == [torch.float64, torch.float64, torch.int64]


def test_a_result_that_goes_into_a_tensor_of_the_model_is_never_written_into_a_copy() -> None:
    kept, wide = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.float64)

    with pytest.raises(RuntimeError), AttentionTap(unpin=True):
        torch.mm(wide, wide, out=kept)
