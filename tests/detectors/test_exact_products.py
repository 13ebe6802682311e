"""Products and attention against float64 on their own operands: small faults of bfloat16 alone, and correct kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.linear import UnknownWeight, exact_product, is_linear
from kvdrift.instruments.exact import LEAST, measure_errors
from kvdrift.pipeline.judge import judge_directory
from kvdrift_bench.models.tiny import lively_model

# Each test of audits takes two to three seconds.
_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (14, 18, 23)}
BF16 = 2.0**-8

Change = Callable[[Tensor], Tensor]


def evidence(audit: Any, instrument: str, mode: str = "kv_aligned") -> Any:
    return next(item for item in audit.evidence if item.instrument == instrument and item.mode == mode)


def along_one_direction(size: float) -> Change:
    """Add a vector of one direction that is `size` of the row."""

    def change(row: Tensor) -> Tensor:
        direction = torch.randn(row.shape[-1], generator=torch.Generator().manual_seed(1))
        added = size * row.float().norm(dim=-1, keepdim=True) * direction / direction.norm()
        return (row.float() + added).to(row.dtype)  # type: ignore[no-any-return]

    return change


def one_above_all(row: Tensor) -> Tensor:
    row = row.clone()
    row[..., 3] = row.amax() + 0.25
    return row


@contextmanager
def changed(module: nn.Module, change: Change, *, prefill: bool = False, inputs: bool = False) -> Iterator[None]:
    """Change what a module gives, or what it gets, in decode steps, or in prefill."""

    def of_this_pass(tensor: Tensor) -> bool:
        return (tensor.shape[1] > 1) == prefill

    def after(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return change(output) if of_this_pass(output) else output

    def before(module: nn.Module, args: Any) -> Any:
        return (change(args[0]), *args[1:]) if of_this_pass(args[0]) else args

    handle = module.register_forward_pre_hook(before) if inputs else module.register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


@cache
def model() -> Any:
    return lively_model("llama", torch.bfloat16)


def audited(module: nn.Module, change: Change, **how: bool) -> Any:
    with changed(module, change, **how):
        return kvdrift.audit(model(), prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")


@pytest.mark.parametrize(
    ("find", "change", "layer", "site"),
    [
        (lambda m: m.lm_head, one_above_all, None, "logits"),
        (lambda m: m.model.layers[1].mlp.down_proj, along_one_direction(0.014), 1, "mlp_out"),
        (lambda m: m.model.layers[1].mlp.gate_proj, along_one_direction(0.012), 1, "mlp_out"),
        (lambda m: m.model.layers[2].self_attn.q_proj, along_one_direction(0.012), 2, "q_proj"),
    ],
    ids=["one_logit", "down", "gate", "query"],
)
def test_a_small_fault_of_one_product_is_found_at_its_site(
    find: Callable[[Any], nn.Module], change: Change, layer: int | None, site: str
) -> None:
    audit = audited(find(model()), change)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (layer, site)
    assert evidence(audit, "products").detail["guilty"] == "decode"


def test_what_changes_an_operand_on_its_way_is_part_of_the_product() -> None:
    """The context that was recorded of attention is the operand of the output projection, and another one came in."""
    audit = audited(model().model.layers[1].self_attn.o_proj, along_one_direction(0.014), inputs=True)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "attn_out")


def test_a_prefill_that_is_off_is_the_guilty_one() -> None:
    audit = audited(model().model.layers[1].mlp.down_proj, along_one_direction(0.014), prefill=True)
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    seen = evidence(audit, "products")
    assert seen.detail["guilty"] == "prefill"
    assert "prefill is off" in seen.text


def noisy_attention(size: float) -> Change:
    generator = torch.Generator().manual_seed(1)

    def change(context: Tensor) -> Tensor:
        return (context.float() * (1.0 + size * torch.randn(context.shape, generator=generator))).to(context.dtype)

    return change


@contextmanager
def attention_changed(layer: int, change: Change, *, prefill: bool = False) -> Iterator[Any]:
    """Change the context of one layer in decode steps, or in prefill, inside of the attention that is called."""
    from transformers import AttentionInterface, AttentionMaskInterface

    plain = AttentionInterface._global_mapping["sdpa"]

    def attention(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        context, weights = plain(module, query, *args, **kwargs)
        if (query.shape[2] > 1) == prefill and module.layer_idx == layer:
            context = change(context)
        return context, weights

    AttentionInterface.register("changed", attention)
    AttentionMaskInterface.register("changed", AttentionMaskInterface._global_mapping["sdpa"])
    try:
        yield lively_model("llama", torch.bfloat16, attention="changed")
    finally:
        del AttentionInterface._global_mapping["changed"], AttentionMaskInterface._global_mapping["changed"]


@pytest.mark.parametrize("side", ["decode", "prefill"])
def test_a_context_that_is_off_at_random_is_found_by_the_other_passs_errors(side: str) -> None:
    with attention_changed(1, noisy_attention(0.04), prefill=side == "prefill") as noisy:
        audit = kvdrift.audit(noisy, prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")
    assert audit.verdict is kvdrift.Verdict.MISMATCH
    assert (audit.first_failure.layer, audit.first_failure.site) == (1, "attn_ctx")  # type: ignore[union-attr]
    seen = evidence(audit, "replay")
    assert seen.statistic > 2.0
    assert seen.detail["guilty"] == side


def test_correct_products_by_other_means_are_far_below_the_bound() -> None:
    """A product in float32 that is rounded once, and one in two parts of which each is rounded."""

    def in_float32(module: Any, x: Tensor) -> Tensor:
        return (x.float() @ module.weight.float().T).to(x.dtype)  # type: ignore[no-any-return]

    def in_two_parts(module: Any, x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        first, second = x[..., :half] @ module.weight[:, :half].T, x[..., half:] @ module.weight[:, half:].T
        return first + second  # type: ignore[no-any-return]

    handles = []
    for name, module in model().named_modules():
        if isinstance(module, nn.Linear):
            multiply = in_two_parts if name.endswith(("down_proj", "o_proj")) else in_float32

            def after(module: Any, args: Any, output: Tensor, multiply: Any = multiply) -> Tensor:
                return multiply(module, args[0]) if output.shape[1] == 1 else output

            handles.append(module.register_forward_hook(after))
    try:
        audit = kvdrift.audit(model(), prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")
    finally:
        for handle in handles:
            handle.remove()
    assert audit.exit_code == 0, audit.verdict
    seen = evidence(audit, "products")
    assert seen.detail["n_products"] == 22
    assert seen.statistic < 0.6
    assert seen.minimum_detectable < 0.01


def test_activations_quantised_on_the_fly_are_named_and_no_alarm() -> None:
    """Both passes multiply rows that were rounded to eight bits with a scale for each row."""

    def in_8_bits(module: Any, args: Any, output: Tensor) -> Tensor:
        x = args[0].float()
        scale = x.abs().amax(-1, keepdim=True) / 127
        return ((x / scale).round() * scale @ module.weight.float().T).to(output.dtype)  # type: ignore[no-any-return]

    handles = [layer.mlp.down_proj.register_forward_hook(in_8_bits) for layer in model().model.layers]
    try:
        audit = kvdrift.audit(model(), prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")
    finally:
        for handle in handles:
            handle.remove()
    seen = evidence(audit, "products")
    assert audit.exit_code == 0
    assert "layer 2 / mlp.down_proj: its activations are rounded to 8 bits on the fly" in seen.text
    assert seen.detail["minimum_by_site"]["mlp_out"] > 3.0 * seen.detail["minimum_by_site"]["attn_out"]


def test_saved_traces_are_judged_alike(tmp_path: Path) -> None:
    with changed(model().model.layers[1].mlp.up_proj, along_one_direction(0.014)):
        audit = kvdrift.audit(model(), prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned", out=tmp_path / "run")
    again, _ = judge_directory(tmp_path / "run")
    first, second = evidence(audit, "products"), evidence(again, "products")
    assert (again.verdict, again.first_failure) == (audit.verdict, audit.first_failure)
    assert (first.statistic, first.minimum_detectable, first.detail) == (
        second.statistic,
        second.minimum_detectable,
        second.detail,
    )


def rows(n_in: int, n_out: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, n_in, generator=generator).bfloat16()
    return x, (torch.randn(n_out, n_in, generator=generator) * n_in**-0.5).bfloat16()


def sizes_of(y: Tensor, x: Tensor, weight: Tensor) -> np.ndarray[Any, Any]:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    reference, spread = (item.detach().numpy() for item in exact_product(linear, x))
    errors = measure_errors(y.float().numpy(), reference, spread, "bfloat16", BF16)
    return np.array([errors.row.max(), errors.block.max(), errors.element.max()])


@pytest.mark.parametrize("n_parts", [2, 8, 16])
def test_partial_sums_in_the_native_dtype_are_what_a_right_kernel_may_do(n_parts: int) -> None:
    x, weight = rows(1024, 512)
    total = torch.zeros(len(x), 512, dtype=torch.bfloat16)
    for a, b in zip(x.chunk(n_parts, 1), weight.chunk(n_parts, 1), strict=True):
        total = total + (a.float() @ b.float().T).bfloat16()
    assert (sizes_of(total, x, weight) < np.array(LEAST)).all()


def test_one_rounding_is_at_most_one() -> None:
    x, weight = rows(256, 512)
    exact = (x.double() @ weight.double().T).bfloat16()
    assert (sizes_of(exact, x, weight) <= 1.0).all()


def test_a_number_that_is_none_is_an_infinite_error_and_one_out_of_range_says_nothing() -> None:
    reference = np.array([[1.0, 2.0, np.nan, 7e4]])
    values = np.array([[1.0, np.nan, np.nan, np.inf]])
    errors = measure_errors(values, reference, np.ones((1, 4)), "float16", 2.0**-11)
    assert np.isinf(errors.element[0])
    assert errors.worst[0] == 1
    assert (
        measure_errors(values[:, [0, 2, 3]], reference[:, [0, 2, 3]], np.ones((1, 3)), "float16", 2.0**-11).row == 0.0
    )


def test_linear_modules_of_every_kind_are_multiplied_as_they_compute() -> None:
    from transformers.pytorch_utils import Conv1D

    x, _ = rows(64, 32)
    for module in (nn.Linear(64, 32), Conv1D(32, 64)):
        module = module.bfloat16()
        assert is_linear(module)
        reference, spread = exact_product(module, x)
        assert torch.allclose(reference.float(), module.float()(x.float()), atol=1e-5)
        assert (spread > 0.0).all()
    packed = nn.Linear(64, 32)
    packed.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnknownWeight, match=r"packed as torch\.int8"):
        exact_product(packed, x)


def test_an_adapter_is_part_of_the_product() -> None:
    lora = pytest.importorskip("peft.tuners.lora")
    base = nn.Linear(64, 32)
    module = lora.Linear(base, "a", config=lora.LoraConfig(r=4), r=4, lora_alpha=8, init_lora_weights=False)
    x, _ = rows(64, 32)
    assert is_linear(module)
    reference, _ = exact_product(module, x)
    assert torch.allclose(reference.float(), module(x.float()), atol=1e-5)
