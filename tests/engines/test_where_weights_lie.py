"""Quantised weights and weights that are kept elsewhere: each model gets a verdict, at every rung, and is left as it
was."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import kvdrift
from kvdrift.errors import CaptureError
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import Mode
from tests.support.every_kind import PROMPTS, lively
from tests.support.matrix import further

logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

PASSES = (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT)


def audited(model: Any, **options: Any) -> Audit:
    return kvdrift.audit(model, prompts=PROMPTS, **{"span": 1, **options})


def replaced(model: Any, make: Callable[[nn.Linear], nn.Module]) -> Any:
    """Return the model with every linear layer below the head replaced."""
    for name, module in list(model.model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, child = name.rpartition(".")
            setattr(model.model.get_submodule(parent), child, make(module))
    return model


def torchao(config: str) -> Any:
    import torchao.quantization as ao

    model = lively()
    ao.quantize_(model, getattr(ao, config)())
    return model


def quanto() -> Any:
    from optimum.quanto import freeze, qint8, quantize

    model = lively()
    quantize(model, weights=qint8)
    freeze(model)
    return model


def bitsandbytes(kind: str) -> Any:
    import bitsandbytes as bnb

    def make(old: nn.Linear) -> nn.Module:
        new: nn.Module
        sizes = (old.in_features, old.out_features)
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4", module=new)
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
        return new.to("cpu")

    return replaced(lively(), make)


class Packed(nn.Module):
    """Eight weights of 4 bits in each int32, with a scale for each 16 of them."""

    def __init__(self, linear: nn.Linear, *, half_only: bool) -> None:
        super().__init__()
        groups = linear.weight.data.float().unflatten(1, (-1, 16))  # type: ignore[no-untyped-call]
        scales = groups.abs().amax(-1).clamp(min=1e-6) / 7
        levels = ((groups / scales[..., None]).round() + 8).to(torch.int32).flatten(1).unflatten(1, (-1, 8))
        self.register_buffer("qweight", sum(levels[..., i] << 4 * i for i in range(8)))
        self.register_buffer("scales", scales.to(linear.weight.dtype))
        self.half_only = half_only

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.half_only and x.dtype.itemsize != 2:
            raise RuntimeError("the kernel is implemented for half types only")
        levels = (self.qweight[..., None] >> torch.arange(0, 32, 4)) & 15  # type: ignore[index]
        weight = (levels - 8).flatten(1).unflatten(1, (-1, 16)).to(self.scales.dtype) * self.scales[..., None]  # type: ignore[index]
        return F.linear(x, weight.flatten(1))


class Bits(nn.Module):
    """A weight that is kept as the bits of its float32 numbers."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("bits", linear.weight.data.float().view(torch.int32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.float(), self.bits.view(torch.float32)).to(x.dtype)  # type: ignore[operator]


QUANTISED = {
    "torchao int8 weights": lambda: torchao("Int8WeightOnlyConfig"),
    "torchao int8 activations": lambda: torchao("Int8DynamicActivationInt8WeightConfig"),
    "quanto int8": quanto,
    "bitsandbytes nf4": lambda: bitsandbytes("nf4"),
    "bitsandbytes int8": lambda: bitsandbytes("int8"),
    "packed, for half types": lambda: replaced(lively(), lambda old: Packed(old, half_only=True)),
    "bits of float32": lambda: replaced(lively(), Bits),
}


CORE = ("torchao int8 weights", "packed, for half types")


@pytest.mark.filterwarnings("ignore")  # of the libraries, on kernels that they lack here
@pytest.mark.parametrize("name", [*CORE, *further(*(name for name in QUANTISED if name not in CORE))])
def test_a_quantised_model_gets_a_verdict(name: str) -> None:
    model = QUANTISED[name]()  # type: ignore[no-untyped-call]
    dtypes = [(key, value.dtype) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)]

    audit = audited(model)

    assert audit.verdict in PASSES, audit.view["reasons"]
    caveat = next(c for c in audit.caveats if c.code == "QUANTISED_LAYERS")
    assert "quantised layers stayed at bfloat16 on the upper rungs of the ladder" in caveat.text
    after = [(key, value.dtype) for key, value in model.state_dict().items() if isinstance(value, torch.Tensor)]
    assert after == dtypes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_layer_that_unpacks_in_torch_follows_the_ladder() -> None:
    audit = audited(replaced(lively(), lambda old: Packed(old, half_only=False)))

    assert audit.verdict in PASSES
    assert "QUANTISED_LAYERS" not in {caveat.code for caveat in audit.caveats}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["torchao int8 weights", "packed, for half types"])
def test_a_quantised_layer_that_is_wrong_for_one_token_is_found(name: str) -> None:
    model = QUANTISED[name]()  # type: ignore[no-untyped-call]
    layer = model.model.layers[1].self_attn.v_proj
    layer.register_forward_hook(lambda _module, _args, out: out * 1.05 if out.shape[1] == 1 else out)

    audit = audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "v_proj")


# ------------------------------------------------------------------------------------------------------- offloaded


def offloaded(model: Any, where: Path | None) -> Any:
    device = torch.device("cpu")
    if where is None:
        return accelerate.cpu_offload(model, execution_device=device)
    return accelerate.disk_offload(model, str(where), execution_device=device)


@pytest.mark.parametrize(("on_disk", "ladder"), [(False, "layer"), (True, "model")])
def test_an_offloaded_model_gives_what_the_model_gives(tmp_path: Path, on_disk: bool, ladder: Any) -> None:
    options = {"ladder": ladder, "mode": "as_designed"}
    plain = audited(lively(), **options)
    model = offloaded(lively(), tmp_path if on_disk else None)

    audit = audited(model, **options)

    assert audit.verdict is plain.verdict
    assert _figures(audit) == _figures(plain)
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    hooks = [module._hf_hook for module in model.modules() if module._parameters]
    assert all(hook.weights_map["weight"].dtype == torch.bfloat16 for hook in hooks)


def _figures(audit: Audit) -> list[Any]:
    measured = audit.suite.judged.measured
    rungs = [measured.table.select(Mode.AS_DESIGNED, rung).rel_l2.tolist() for rung in ("bfloat16", "float64")]
    assert all(rungs)
    return [*rungs, measured.info.model_hash]


def test_a_fault_in_an_offloaded_model_is_found() -> None:
    model = offloaded(lively(), None)
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_hook(lambda _module, _args, out: out * 1.0001 if out.shape[1] == 1 else out)

    audit = audited(model)

    assert audit.verdict is Verdict.MISMATCH
    assert audit.first_failure is not None
    assert (audit.first_failure.layer, str(audit.first_failure.site)) == (1, "mlp_out")


def test_weights_that_are_nowhere_are_named() -> None:
    with pytest.raises(CaptureError, match=r"lm_head\.weight are on the device 'meta', without values"):
        audited(lively().to("meta"))
