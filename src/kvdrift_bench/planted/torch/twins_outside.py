"""Clean twins outside attention: projections, norms, rotation, feed-forward modules and sums in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.norms_mlp import epsilon_of, scaled_like
from kvdrift_bench.planted.torch.parts import (
    attention_modules,
    decoder_layers,
    frequencies,
    heads,
    layer_norms,
    mlps,
    needs_modules,
    needs_rotation,
    norms,
    wide,
)
from kvdrift_bench.planted.torch.registry import twin, twins
from kvdrift_bench.planted.torch.ways import Rotation, Way, in_rotation
from kvdrift_bench.planted.torch.ways_modules import Modules, in_outputs

Args = tuple[Any, ...]

# ------------------------------------------------------------------------------------------------------ products


def _linears(model: nn.Module) -> list[nn.Module]:
    """Every linear projection of the layers."""
    return [module for block in decoder_layers(model) for module in block.modules() if isinstance(module, nn.Linear)]


_needs_linears = needs_modules(_linears, "no linear projections")
_needs_head = needs_modules(heads, "no linear projections")


def _in_products(modules: Modules) -> Callable[[Callable[[Tensor, Tensor], Tensor]], Way]:
    """Compute products of inputs [..., inner] and weights [outer, inner] otherwise; the bias is added as usual."""

    def seam(multiply: Callable[[Tensor, Tensor], Tensor]) -> Way:
        def change(module: Any, args: Args, output: Tensor) -> Tensor:
            out = multiply(args[0], module.weight)
            bias = getattr(module, "bias", None)
            return (out if bias is None else out + bias).to(output.dtype)

        change.__name__ = multiply.__name__
        return in_outputs(modules)(change)

    return seam


def _sum_of_parts(x: Tensor, weight: Tensor, n_parts: int) -> Tensor:
    """Parts are kept wide until they are added."""
    parts = zip(wide(x).chunk(n_parts, -1), wide(weight).chunk(n_parts, -1), strict=True)
    return torch.stack([F.linear(left, right) for left, right in parts]).sum(0)


@twins({"products_in_two_parts": 2, "products_in_four_parts": 4}, _needs_linears)
def products_in_parts(n_parts: int) -> Way:
    return _in_products(_linears)(lambda x, weight: _sum_of_parts(x, weight, n_parts))


@twin(_needs_head)
@_in_products(heads)
def head_in_two_parts(x: Tensor, weight: Tensor) -> Tensor:
    return _sum_of_parts(x, weight, 2)


@twin(_needs_linears)
@_in_products(_linears)
def products_reversed(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(wide(x).flip(-1), wide(weight).flip(-1))


@twin(_needs_linears)
@_in_products(_linears)
def products_elementwise(x: Tensor, weight: Tensor) -> Tensor:
    return (wide(x)[..., None, :] * wide(weight)).sum(-1)


@twin(_needs_linears)
@_in_products(_linears)
def rows_beside_others(x: Tensor, weight: Tensor) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    many = torch.cat([rows, rows.roll(1, -1), rows * 2.0, -rows, rows.flip(-1)])
    return F.linear(many, weight)[: len(rows)].reshape(*x.shape[:-1], -1)


@twin(_needs_linears)
@_in_products(_linears)
def rows_duplicated(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(torch.cat([x] * 8, dim=0), weight)[:1]


@twin(_needs_linears)
@_in_products(_linears)
def columns_in_four_parts(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(x, part) for part in weight.chunk(4, 0)], dim=-1)


# ------------------------------------------------------------------------------------------------------ norms, rotation

_needs_norms = needs_modules(norms, "no norms")


@twin(_needs_norms)
@in_outputs(norms)
def norms_in_float64(module: Any, args: Args, output: Tensor) -> Tensor:
    x = args[0].to(torch.float64)
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
    return scaled_like(module, normed).to(output.dtype)


@twin(_needs_norms)
@in_outputs(norms)
def norms_by_vector_norm(module: Any, args: Args, output: Tensor) -> Tensor:
    """Root mean square from the 2-norm of the row."""
    x = wide(args[0])
    if isinstance(module, nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
    return scaled_like(module, x / torch.sqrt(square + getattr(module, epsilon_of(module)))).to(output.dtype)


@twin(needs_rotation)
@in_rotation
def rope_tables_in_float64(call: Rotation) -> tuple[Tensor, Tensor]:
    table = getattr(call.module, frequencies(call.module)[0]).to(torch.float64)
    angle = call.positions.to(torch.float64)[..., None] * table
    if call.cos.shape[-1] == 2 * len(table):
        angle = torch.cat([angle, angle], dim=-1)
    scale = getattr(call.module, "attention_scaling", 1.0)
    cos, sin = (angle.cos() * scale).to(call.cos.dtype), (angle.sin() * scale).to(call.sin.dtype)
    return call.rotate(call.q, call.k, cos, sin)


@twin(needs_rotation)
@in_rotation
def heads_rotated_one_by_one(call: Rotation) -> tuple[Tensor, Tensor]:
    q = [call.rotate(q, call.k, call.cos, call.sin)[0] for q in torch.split(call.q, 1, dim=1)]
    k = [call.rotate(call.q, k, call.cos, call.sin)[1] for k in torch.split(call.k, 1, dim=1)]
    return torch.cat(q, dim=1), torch.cat(k, dim=1)


# ------------------------------------------------------------------------------------------------------ sums


def _needs_gated_mlp(model: nn.Module) -> str | None:
    """A feed-forward module of three plain projections."""
    names = ("gate_proj", "up_proj", "down_proj")
    found = mlps(model)
    plain = found and all(isinstance(getattr(mlp, name, None), nn.Linear) for mlp in found for name in names)
    return None if plain else "no gated feed-forward module"


def _needs_plain_residual(model: nn.Module) -> str | None:
    """Three terms: nothing norms the output of attention or of the feed-forward part before it is added."""
    if any(name.endswith("post_feedforward_layernorm") for name, _ in model.named_modules()):
        return "outputs are normed before they are added"
    return _needs_gated_mlp(model)


@twin(_needs_gated_mlp)
@in_outputs(mlps)
def mlp_width_in_parts(module: Any, args: Args, output: Tensor) -> Tensor:
    """The intermediate width in three parts, whose outputs are added."""
    x = wide(args[0])
    total = torch.zeros_like(wide(output))
    parts = [getattr(module, name).weight.chunk(3, 0) for name in ("gate_proj", "up_proj")]
    for gate, up, down in zip(*parts, module.down_proj.weight.chunk(3, 1), strict=True):
        hidden = module.act_fn(F.linear(x, wide(gate))) * F.linear(x, wide(up))
        total = total + F.linear(hidden, wide(down))
    return total.to(output.dtype)


@twin(_needs_plain_residual)
@contextmanager
def residual_added_the_other_way_round(model: nn.Module, commits: Commits) -> Iterator[None]:
    """Add attention and feed-forward output to each other first, and then to the residual."""
    kept: dict[str, Tensor] = {}
    attentions = attention_modules(model)

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def after(module: Any, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return after

    def enter(module: Any, args: Args) -> None:
        kept["in"] = args[0]  # what the first norm reads is the residual, whoever put it there

    def leave(module: Any, args: Any, output: Any) -> Any:
        if not commits.decoding:
            return None
        hidden = output[0] if isinstance(output, tuple) else output
        other = commits.take(hidden, kept["in"] + (kept["attention"] + kept["mlp"]))
        return (other, *output[1:]) if isinstance(output, tuple) else other

    handles: list[Any] = []
    for layer, (block, norm, mlp) in enumerate(
        zip(decoder_layers(model), layer_norms(model), mlps(model), strict=True)
    ):
        handles.append(norm.register_forward_pre_hook(enter))
        handles.append(attentions[layer].register_forward_hook(keep("attention")))
        handles.append(mlp.register_forward_hook(keep("mlp")))
        handles.append(block.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@twin(needs_rotation)
@contextmanager
def all_positions_shifted(model: Any, commits: Commits) -> Iterator[None]:
    """In prefill and in decode."""

    def shift(module: nn.Module, args: Args, kwargs: dict[str, Any]) -> Any:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            return None
        right = torch.arange(commits.past, commits.past + ids.shape[1], device=ids.device)[None]
        return args, {**kwargs, "position_ids": commits.take(right, right + 3)}

    handle = model.base_model.register_forward_pre_hook(shift, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
