"""Norms, rotation and feed-forward modules computed by other means."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.kernels.attention import by_inductor
from kvdrift_bench.planted.kernels.below import dense, needs_compiler, run, unseen
from kvdrift_bench.planted.kernels.registry import kernel
from kvdrift_bench.planted.torch.norms_mlp import epsilon_of
from kvdrift_bench.planted.torch.parts import mlps, needs_modules, needs_rotation, norms, wide
from kvdrift_bench.planted.torch.ways import Rotation, RotationChange, Way, in_rotation
from kvdrift_bench.planted.torch.ways_modules import in_outputs

Args = tuple[Any, ...]

# ------------------------------------------------------------------------------------------------------ norms


def _rms_norms(model: nn.Module) -> list[nn.Module]:
    """Norms by the root mean square, whose weight is a plain factor."""
    return [module for module in norms(model) if "RMSNorm" in type(module).__name__]


needs_rms = needs_modules(_rms_norms, "no norms by the root mean square")


def rms_in_cpp(model: nn.Module) -> str | None:
    """Norms by the root mean square, and a C++ compiler."""
    return needs_rms(model) or needs_compiler(model)


def _factor(module: Any) -> Tensor:
    """The factor of each dim; models of the Gemma family keep it less one."""
    weight: Tensor = module.weight.detach()
    return 1.0 + wide(weight) if type(module).__name__.startswith("Gemma") else weight


@kernel(needs_rms)
@in_outputs(_rms_norms)
def norm_rounded_before_the_weight(module: Any, args: Args, output: Tensor) -> Tensor:
    x = wide(args[0])
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
    return (normed.to(output.dtype) * _factor(module).to(output.dtype)).to(output.dtype)


@kernel(needs_rms)
@in_outputs(_rms_norms)
def norm_rounded_behind_the_weight(module: Any, args: Args, output: Tensor) -> Tensor:
    x = wide(args[0])
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
    return (normed * wide(_factor(module))).to(output.dtype)


@kernel(needs_rms)
@in_outputs(_rms_norms)
def norm_divided_by_the_root(module: Any, args: Args, output: Tensor) -> Tensor:
    x = wide(args[0])
    root = ((x * x).sum(-1, keepdim=True) / x.shape[-1] + getattr(module, epsilon_of(module))).sqrt()
    normed: Tensor = wide(_factor(module)) * (x / root)
    return normed.to(output.dtype)


def norms_in_cpp(defect: str = "", modules: Any = _rms_norms) -> Way:
    """Compute norms by a kernel of below.cpp: one pass, float32 throughout."""

    def change(module: Any, args: Args, output: Tensor) -> Tensor:
        with unseen():
            rows = dense(args[0]).reshape(-1, args[0].shape[-1])
            out, weight = torch.empty_like(rows), dense(_factor(module))
            epsilon = float(getattr(module, epsilon_of(module)))
            run("rms_norm", rows, weight, out, *rows.shape, epsilon, defect=defect)
            return out.reshape(args[0].shape).to(output.dtype)

    return in_outputs(modules)(change)


kernel(rms_in_cpp, name="norm_cpp")(norms_in_cpp())


def _normed(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon) * weight.float()


@kernel(rms_in_cpp)
@in_outputs(_rms_norms)
def norm_inductor(module: Any, args: Args, output: Tensor) -> Tensor:
    epsilon = float(getattr(module, epsilon_of(module)))
    return by_inductor(_normed)(args[0], _factor(module), epsilon).to(output.dtype)


# ------------------------------------------------------------------------------------------------------ rotation


def rotation_in_cpp(model: nn.Module) -> str | None:
    """Rotary position embedding of all dims, in halves, and a C++ compiler."""
    return _whole_rotation(model) or needs_compiler(model)


def _whole_rotation(model: Any) -> str | None:
    """Rotary position embedding of all dims, in halves."""
    partial = getattr(model.config, "partial_rotary_factor", None) or 1.0
    if getattr(model.config, "rope_parameters", None):
        partial = model.config.rope_parameters.get("partial_rotary_factor", partial)
    return needs_rotation(model) or (None if partial == 1.0 else "a part of the dims is rotated")


@kernel(_whole_rotation)
@in_rotation
def rotation_in_float32(call: Rotation) -> tuple[Tensor, Tensor]:
    """Products and their sum are rounded once, not three times."""
    q, k = call.rotate(wide(call.q), wide(call.k), wide(call.cos), wide(call.sin))
    return q.to(call.q.dtype), k.to(call.k.dtype)


@kernel(_whole_rotation)
@in_rotation
def rotation_by_a_float32_table(call: Rotation) -> tuple[Tensor, Tensor]:
    """Sines and cosines are kept in float32, whatever is computed with them."""
    return call.rotate(call.q, call.k, *(table.float().to(call.q.dtype) for table in (call.cos, call.sin)))


@kernel(_whole_rotation)
@in_rotation
def rotation_of_complex_numbers(call: Rotation) -> tuple[Tensor, Tensor]:
    half = call.cos.shape[-1] // 2
    turn = torch.complex(wide(call.cos[..., :half]), wide(call.sin[..., :half]))[:, None]

    def turned(x: Tensor) -> Tensor:
        pairs = torch.complex(*(part.contiguous() for part in torch.split(wide(x), half, -1))) * turn
        return torch.cat([pairs.real, pairs.imag], dim=-1).to(x.dtype)

    return turned(call.q), turned(call.k)


def in_cpp(defect: str = "") -> RotationChange:
    """Return the rotation by a kernel of below.cpp, in float32."""

    def change(call: Rotation) -> tuple[Tensor, Tensor]:
        with unseen():
            cos, sin = dense(call.cos), dense(call.sin)
            turned = []
            for tensor in (call.q, call.k):
                x = dense(tensor).clone()
                run("rotate", x, cos, sin, *x.shape[1:], defect=defect)
                turned.append(x.to(tensor.dtype))
            return turned[0], turned[1]

    return change


kernel(rotation_in_cpp, name="rotation_cpp")(in_rotation(in_cpp()))

# ------------------------------------------------------------------------------------------------------ feed-forward


def gated_mlps(model: nn.Module) -> list[nn.Module]:
    """Return feed-forward modules of three plain projections with silu."""
    names = ("gate_proj", "up_proj", "down_proj")
    found: list[Any] = [mlp for mlp in mlps(model) if all(_plain(getattr(mlp, name, None)) for name in names)]
    return [mlp for mlp in found if "SiLU" in type(mlp.act_fn).__name__]


def _plain(module: Any) -> bool:
    """Whether a module is a projection without a bias."""
    return isinstance(module, nn.Linear) and module.bias is None


needs_gated = needs_modules(gated_mlps, "no feed-forward module of three projections with silu")


def gated_in_cpp(model: nn.Module) -> str | None:
    """Feed-forward modules of three projections with silu, and a C++ compiler."""
    return needs_gated(model) or needs_compiler(model)


@kernel(needs_gated)
@in_outputs(gated_mlps)
def activation_in_float32(module: Any, args: Args, output: Tensor) -> Tensor:
    """The product of both halves is rounded once, not twice."""
    gate, up = (F.linear(args[0], projection.weight) for projection in (module.gate_proj, module.up_proj))
    hidden = F.silu(wide(gate)) * wide(up)
    return F.linear(hidden.to(args[0].dtype), module.down_proj.weight)


def activations_in_cpp(defect: str = "") -> Way:
    """Compute silu(gate) * up by a kernel of below.cpp."""

    def change(module: Any, args: Args, output: Tensor) -> Tensor:
        gate, up = (F.linear(args[0], projection.weight) for projection in (module.gate_proj, module.up_proj))
        with unseen():
            out = torch.empty(gate.shape)
            run("gated", dense(gate), dense(up), out, gate.numel(), defect=defect)
            hidden = out.to(gate.dtype)
        return F.linear(hidden, module.down_proj.weight)

    return in_outputs(gated_mlps)(change)


kernel(gated_in_cpp, name="activation_cpp")(activations_in_cpp())


def _feed_forward(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.silu(F.linear(x, gate)) * F.linear(x, up), down)


@kernel(gated_in_cpp)
@in_outputs(gated_mlps)
def mlp_inductor(module: Any, args: Args, output: Tensor) -> Tensor:
    weights = (getattr(module, name).weight for name in ("gate_proj", "up_proj", "down_proj"))
    return by_inductor(_feed_forward)(args[0], *weights)
