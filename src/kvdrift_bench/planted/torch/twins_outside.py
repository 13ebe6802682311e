"""Clean twins outside attention: projections, norms, rotation, feed-forward modules and sums in another order."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.torch.model import CleanTwin, Commits
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
from kvdrift_bench.planted.torch.ways import Rotation, in_rotation, planted
from kvdrift_bench.planted.torch.ways_modules import in_outputs

Linear = Callable[[Tensor, Tensor], Tensor]


def outside_twins() -> tuple[CleanTwin, ...]:
    """Return the clean twins outside attention."""
    return (*_products(), *_elementwise(), *_sums(), *_both_passes())


def linears(model: nn.Module) -> list[nn.Module]:
    """Return every linear projection of the layers."""
    return [module for block in decoder_layers(model) for module in block.modules() if isinstance(module, nn.Linear)]


def _products() -> tuple[CleanTwin, ...]:
    def product(name: str, reference: str, why: str, find: Any, multiply: Linear) -> CleanTwin:
        def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            out = multiply(args[0], module.weight)
            bias = getattr(module, "bias", None)
            return (out if bias is None else out + bias).to(output.dtype)

        applies = needs_modules(find, "no linear projections")
        return CleanTwin(
            name=name, reference=reference, why=why, plant=planted(in_outputs(find, change)), applies=applies
        )

    def in_parts(n: int) -> Linear:
        """Sums of parts, kept wide until they are added."""

        def multiply(x: Tensor, weight: Tensor) -> Tensor:
            parts = zip(wide(x).chunk(n, -1), wide(weight).chunk(n, -1), strict=True)
            return torch.stack([F.linear(left, right) for left, right in parts]).sum(0)

        return multiply

    def beside_others(x: Tensor, weight: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        many = torch.cat([rows, rows.roll(1, -1), rows * 2.0, -rows, rows.flip(-1)])
        return F.linear(many, weight)[: len(rows)].reshape(*x.shape[:-1], -1)

    def duplicated(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(torch.cat([x] * 8, dim=0), weight)[:1]

    def reversed_order(x: Tensor, weight: Tensor) -> Tensor:
        return F.linear(wide(x).flip(-1), wide(weight).flip(-1))

    def by_columns(x: Tensor, weight: Tensor) -> Tensor:
        return torch.cat([F.linear(x, part) for part in weight.chunk(4, 0)], dim=-1)

    def elementwise(x: Tensor, weight: Tensor) -> Tensor:
        return (wide(x)[..., None, :] * wide(weight)).sum(-1)

    order = "The same sum in another order."
    alone = "Rows of a matrix product do not know each other."
    return (
        product("products_in_two_parts", "huggingface/transformers#31127", order, linears, in_parts(2)),
        product("products_in_four_parts", "vllm-project/vllm#7779", order, linears, in_parts(4)),
        product("products_reversed", "huggingface/transformers#27040", order, linears, reversed_order),
        product("products_elementwise", "huggingface/transformers#31267", order, linears, elementwise),
        product("rows_beside_others", "vllm-project/vllm#5898", alone, linears, beside_others),
        product("rows_duplicated", "vllm-project/vllm#9567", alone, linears, duplicated),
        product("columns_in_four_parts", "verl-project/verl#6280", "Columns are computed apart.", linears, by_columns),
        product("head_in_two_parts", "ml-explore/mlx-lm#259", order, heads, in_parts(2)),
    )


def _elementwise() -> tuple[CleanTwin, ...]:
    def in_float64(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        x = args[0].to(torch.float64)
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        normed = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + getattr(module, epsilon_of(module)))
        return scaled_like(module, normed).to(output.dtype)

    def by_norm(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """Root mean square from the 2-norm of the row."""
        x = wide(args[0])
        if isinstance(module, nn.LayerNorm):
            x = x - x.mean(-1, keepdim=True)
        square = torch.linalg.vector_norm(x, dim=-1, keepdim=True) ** 2 / x.shape[-1]
        return scaled_like(module, x / torch.sqrt(square + getattr(module, epsilon_of(module)))).to(output.dtype)

    def tables_in_float64(call: Rotation) -> tuple[Tensor, Tensor]:
        table = getattr(call.module, frequencies(call.module)[0]).to(torch.float64)
        angle = call.positions.to(torch.float64)[..., None] * table
        if call.cos.shape[-1] == 2 * len(table):
            angle = torch.cat([angle, angle], dim=-1)
        scale = getattr(call.module, "attention_scaling", 1.0)
        cos, sin = (angle.cos() * scale).to(call.cos.dtype), (angle.sin() * scale).to(call.sin.dtype)
        return call.rotate(call.q, call.k, cos, sin)

    def one_by_one(call: Rotation) -> tuple[Tensor, Tensor]:
        """Heads rotated one after another."""
        q = [call.rotate(q, call.k, call.cos, call.sin)[0] for q in torch.split(call.q, 1, dim=1)]
        k = [call.rotate(call.q, k, call.cos, call.sin)[1] for k in torch.split(call.k, 1, dim=1)]
        return torch.cat(q, dim=1), torch.cat(k, dim=1)

    found = needs_modules(norms, "no norms")
    return (
        CleanTwin(
            name="norms_in_float64",
            reference="huggingface/transformers#29282",
            why="More precision than needed, rounded once at the end.",
            plant=planted(in_outputs(norms, in_float64)),
            applies=found,
        ),
        CleanTwin(
            name="norms_by_vector_norm",
            reference="NVIDIA/Megatron-LM#6459",
            why="The mean square is the squared 2-norm over the width.",
            plant=planted(in_outputs(norms, by_norm)),
            applies=found,
        ),
        CleanTwin(
            name="rope_tables_in_float64",
            reference="huggingface/transformers#25420",
            why="More precision than needed, rounded once at the end.",
            plant=planted(in_rotation(tables_in_float64)),
            applies=needs_rotation,
        ),
        CleanTwin(
            name="heads_rotated_one_by_one",
            reference="ggml-org/llama.cpp#25315",
            why="Heads are rotated apart.",
            plant=planted(in_rotation(one_by_one)),
            applies=needs_rotation,
        ),
    )


def needs_gated_mlp(model: nn.Module) -> str | None:
    """A feed-forward module of three plain projections."""
    names = ("gate_proj", "up_proj", "down_proj")
    found = mlps(model)
    plain = found and all(isinstance(getattr(mlp, name, None), nn.Linear) for mlp in found for name in names)
    return None if plain else "no gated feed-forward module"


def needs_plain_residual(model: nn.Module) -> str | None:
    """Three terms: nothing norms the output of attention or of the feed-forward part before it is added."""
    if any(name.endswith("post_feedforward_layernorm") for name, _ in model.named_modules()):
        return "outputs are normed before they are added"
    return needs_gated_mlp(model)


def _sums() -> tuple[CleanTwin, ...]:
    def in_width_chunks(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        """The intermediate width in three parts, whose outputs are added."""
        x = wide(args[0])
        total = torch.zeros_like(wide(output))
        parts = [getattr(module, name).weight.chunk(3, 0) for name in ("gate_proj", "up_proj")]
        for gate, up, down in zip(*parts, module.down_proj.weight.chunk(3, 1), strict=True):
            hidden = module.act_fn(F.linear(x, wide(gate))) * F.linear(x, wide(up))
            total = total + F.linear(hidden, wide(down))
        return total.to(output.dtype)

    return (
        CleanTwin(
            name="mlp_width_in_parts",
            reference="vllm-project/vllm#55238",
            why="The intermediate width is summed over, in any order.",
            plant=planted(in_outputs(mlps, in_width_chunks)),
            applies=needs_gated_mlp,
        ),
        CleanTwin(
            name="residual_added_the_other_way_round",
            reference="ggml-org/llama.cpp#7859",
            why="Three terms are added in another order.",
            plant=planted(_other_order),
            applies=needs_plain_residual,
        ),
    )


@contextmanager
def _other_order(model: nn.Module, commits: Commits) -> Iterator[None]:
    """Add attention and feed-forward output to each other first, and then to the residual."""
    kept: dict[str, Tensor] = {}
    attentions = attention_modules(model)

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        def after(module: Any, args: Any, output: Any) -> None:
            kept[name] = output[0] if isinstance(output, tuple) else output

        return after

    def enter(module: Any, args: tuple[Any, ...]) -> None:
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


def _both_passes() -> tuple[CleanTwin, ...]:
    return (
        CleanTwin(
            name="all_positions_shifted",
            reference="huggingface/transformers#25420",
            why="Rotary embedding is relative: a constant for all tokens, of prefill and decode, cancels.",
            plant=planted(_shifted_everywhere),
            applies=needs_rotation,
        ),
    )


@contextmanager
def _shifted_everywhere(model: Any, commits: Commits) -> Iterator[None]:
    def shift(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
