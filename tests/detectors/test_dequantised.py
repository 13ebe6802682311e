"""Dequantised weights: they give what the layer gives, and a scale that decode alone has otherwise is found."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvdrift
from kvdrift.engines.torch.linear import exact_product, is_linear
from kvdrift.engines.torch.rounded import ROUNDED_TO_8_BITS, note_of
from kvdrift.instruments.exact import measure_errors
from kvdrift.trace.model import MEASURED
from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.models.tiny import lively_model

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, on kernels that they lack here

BF16 = 2.0**-8


def bitsandbytes(old: nn.Linear, kind: str) -> nn.Module:
    import bitsandbytes as bnb

    new: nn.Module
    sizes = (old.in_features, old.out_features)
    if kind == "int8":
        new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
        new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
    else:
        name, twice = kind.removesuffix("-twice"), kind.endswith("-twice")
        new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type=name)
        new.weight = bnb.nn.Params4bit(
            old.weight.data, requires_grad=False, quant_type=name, compress_statistics=twice, module=new
        )
    return new.to("cpu")


def torchao(old: nn.Linear, config: str) -> nn.Module:
    import torchao.quantization as ao

    around = nn.Sequential(old)
    ao.quantize_(around, getattr(ao, config)())
    return around[0]


def quanto(old: nn.Linear, kind: str) -> nn.Module:
    from optimum import quanto

    around = nn.Sequential(old)
    quanto.quantize(around, weights=getattr(quanto, kind))
    quanto.freeze(around)
    return around[0]


# By name: what makes the layer, and whether its activations are quantised.
LAYERS: dict[str, tuple[Callable[[nn.Linear], nn.Module], bool]] = {
    "bitsandbytes nf4": (lambda old: bitsandbytes(old, "nf4"), False),
    "bitsandbytes nf4 twice": (lambda old: bitsandbytes(old, "nf4-twice"), False),
    "bitsandbytes fp4": (lambda old: bitsandbytes(old, "fp4"), False),
    "bitsandbytes int8": (lambda old: bitsandbytes(old, "int8"), False),
    "torchao int8": (lambda old: torchao(old, "Int8WeightOnlyConfig"), False),
    "torchao int8, dynamic": (lambda old: torchao(old, "Int8DynamicActivationInt8WeightConfig"), True),
    "torchao float8": (lambda old: torchao(old, "Float8WeightOnlyConfig"), False),
    "quanto int8": (lambda old: quanto(old, "qint8"), False),
    "quanto int4": (lambda old: quanto(old, "qint4"), False),
    "quanto float8": (lambda old: quanto(old, "qfloat8"), False),
}


def linear() -> nn.Linear:
    module = nn.Linear(128, 96, bias=False, dtype=torch.bfloat16)
    module.weight.data = 0.1 * torch.randn(96, 128, generator=torch.Generator().manual_seed(1)).bfloat16()
    return module


def rows() -> Tensor:
    return torch.randn(12, 128, generator=torch.Generator().manual_seed(2)).bfloat16()


def rounded_otherwise(y: Tensor, reference: Tensor, spread: Tensor) -> Any:
    """The largest error of a row, in roundings."""
    return measure_errors(y.float().numpy(), reference.numpy(), spread.numpy(), "bfloat16", BF16).row.max()


@torch.no_grad()
@pytest.mark.parametrize("name", LAYERS)
def test_a_dequantised_weight_gives_what_its_layer_gives(name: str) -> None:
    make, is_rounded = LAYERS[name]
    module, x = make(linear()), rows()
    assert is_linear(module)
    many, single = module(x[None])[0], torch.cat([module(row[None, None])[0] for row in x])

    reference, spread = exact_product(module, x)

    for y in (many, single):
        assert rounded_otherwise(y, reference, spread) < (2.0 if is_rounded else 0.75)
        note = note_of(lambda found: exact_product(module, found)[0], x, y, reference)
        assert note == (ROUNDED_TO_8_BITS if is_rounded else None)


def per_row(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round() * scale


def per_row_from_least_to_most(x: Tensor) -> Tensor:
    most, least = x.amax(-1, keepdim=True), x.amin(-1, keepdim=True)
    scale = (most - least) / 255
    zero = (least / scale).round()
    return ((x / scale).round() - zero).clamp(0, 255) * scale + zero * scale


def beside_outliers(x: Tensor) -> Tensor:
    """As LLM.int8 does: columns that hold a large number stay as they are."""
    outlier = (x.abs() > 6.0).any(0)
    return torch.where(outlier, x, per_row(torch.where(outlier, 0.0, x)))


def to_float8(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 448
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def to_four_bits(x: Tensor) -> Tensor:
    scale = x.abs().amax(-1, keepdim=True) / 7
    return (x / scale).round() * scale


@torch.no_grad()
@pytest.mark.parametrize("rounding", [per_row, per_row_from_least_to_most, beside_outliers, to_float8, to_four_bits])
def test_roundings_of_activations_are_told_from_each_other(rounding: Callable[[Tensor], Tensor]) -> None:
    module, x = linear(), rows()
    x[:, [5, 70]] *= 9.0
    reference, _ = exact_product(module, x)
    y = (rounding(x.float()) @ module.weight.float().T).bfloat16()

    note = note_of(lambda found: exact_product(module, found)[0], x, y, reference)

    assert note == (None if rounding is to_four_bits else ROUNDED_TO_8_BITS)


# ------------------------------------------------------------------------------------------ scales of decode alone

_GENERATOR = np.random.default_rng(7)
PROMPTS = {f"p{n}": [int(token) for token in _GENERATOR.integers(0, 128, n)] for n in (14, 18, 23)}
SCALES: dict[str, Callable[[Any], Tensor]] = {
    "bitsandbytes nf4": lambda module: module.weight.quant_state.absmax,
    "bitsandbytes int8": lambda module: module.weight.SCB if module.weight.SCB is not None else module.state.SCB,
    "torchao int8": lambda module: module.weight.scale,
    "torchao int8, dynamic": lambda module: module.weight.scale,
    "quanto int8": lambda module: module.weight._scale,
}


def notes_of(evidence: Any) -> dict[str, str]:
    notes: dict[str, str] = evidence.detail["notes"]
    return notes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "bitsandbytes nf4" else pytest.mark.matrix) for name in SCALES]
)
@pytest.mark.parametrize("is_faulty", [True, False])
def test_a_scale_that_is_another_in_decode_is_found(name: str, is_faulty: bool) -> None:
    model = lively_model("llama", torch.bfloat16)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = LAYERS[name][0](mlp.up_proj)
    planted = 0

    def scaled(factor: float, x: Tensor) -> None:
        nonlocal planted
        if is_faulty and x.shape[1] == 1:
            SCALES[name](mlp.up_proj).flatten()[:16] *= factor
            planted += 1

    mlp.up_proj.register_forward_pre_hook(lambda _module, args: scaled(1.25, args[0]))
    mlp.up_proj.register_forward_hook(lambda _module, args, _output: scaled(1 / 1.25, args[0]))

    audit = kvdrift.audit(model, prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")

    assert (planted > 0) == is_faulty
    assert (audit.verdict is Verdict.MISMATCH) == is_faulty
    seen = next(item for item in audit.evidence if item.instrument == "products")
    # Where the processor has such kernels, bitsandbytes packs a weight anew that it multiplies with for the first time,
    # and multiplies in integers.
    note = notes_of(seen).get("layer 1 / mlp.up_proj")
    assert note in {"torchao int8, dynamic": (ROUNDED_TO_8_BITS,), "bitsandbytes int8": (None, ROUNDED_TO_8_BITS)}.get(
        name, (None, MEASURED)
    )
    if is_faulty:
        assert audit.first_failure is not None
        assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")
        assert seen.detail["guilty"] == (None if note == MEASURED else "decode")


def test_a_weight_that_was_dequantised_wrongly_is_measured_instead(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where a library packs it in a new way: a reference that is far from both passes would hide any fault."""
    from kvdrift.engines.torch import linear as linears

    model = lively_model("llama", torch.bfloat16)
    mlp = model.model.layers[1].mlp
    mlp.up_proj = bitsandbytes(mlp.up_proj, "int8")
    dense = linears._dense
    monkeypatch.setattr(linears, "_dense", lambda module: dense(module) * (2.0 if module is mlp.up_proj else 1.0))

    audit = kvdrift.audit(model, prompts=PROMPTS, span=3, ladder="off", mode="kv_aligned")

    seen = next(item for item in audit.evidence if item.instrument == "products")
    assert notes_of(seen)["layer 1 / mlp.up_proj"].startswith(MEASURED)
    assert seen.statistic is not None
    assert seen.statistic < 0.6
