"""Projections, head and packed weights computed by other means."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvdrift_bench.planted.kernels import by_numba
from kvdrift_bench.planted.kernels.attention import needs_numba
from kvdrift_bench.planted.kernels.below import dense, needs_compiler, run, unseen
from kvdrift_bench.planted.kernels.registry import kernel, kernels
from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import (
    attentions,
    decoder_layers,
    heads,
    mlps,
    needs_modules,
    output_projections,
    wide,
)
from kvdrift_bench.planted.torch.ways import Way
from kvdrift_bench.planted.torch.ways_modules import Modules, in_outputs

Multiply = Callable[[Tensor, Tensor], Tensor]

_FEW_ROWS = 8  # up to this many are multiplied by the kernel for packed weights, more by the unpacked weights
_BLOCK = 48  # columns of the head that are computed at a time
_GROUP = 16  # inputs that share a factor, of weights in 4 bits


def linears(model: nn.Module) -> list[nn.Module]:
    """Return every linear projection of the layers."""
    return [module for block in decoder_layers(model) for module in block.modules() if isinstance(module, nn.Linear)]


def downs(model: nn.Module) -> list[nn.Module]:
    """Return the projections whose inputs are split among devices: behind attention, and the last of each MLP."""
    owners: list[Any] = mlps(model)
    found = [*output_projections(model), *(getattr(owner, "down_proj", None) for owner in owners)]
    return [module for module in found if isinstance(module, nn.Linear)]


needs_linears = needs_modules(linears, "no linear projections")
needs_head = needs_modules(heads, "no language-modelling head")


def linears_in_cpp(model: nn.Module) -> str | None:
    """Linear projections, and a C++ compiler."""
    return needs_linears(model) or needs_compiler(model)


def linears_in_numba(model: nn.Module) -> str | None:
    """Linear projections, and numba."""
    return needs_linears(model) or needs_numba(model)


def multiplied(modules: Modules, multiply: Multiply) -> Way:
    """Compute products of inputs [..., inner] and weights [outer, inner] by `multiply`; the bias is added as usual."""

    def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        out = multiply(args[0], module.weight)
        bias = getattr(module, "bias", None)
        return (out if bias is None else out + bias).to(output.dtype)

    return in_outputs(modules)(change)


def by_gemv(*, kahan: bool = False, defect: str = "") -> Multiply:
    """Return products by a kernel of below.cpp: sums in float32, whatever the dtype of the model is."""

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        with unseen():
            rows = dense(x).reshape(-1, x.shape[-1])
            out = torch.empty(len(rows), len(weight))
            run("gemv", rows, dense(weight), out, len(rows), *weight.shape, kahan, defect=defect)
            return out.reshape(*x.shape[:-1], -1).to(x.dtype)

    return multiply


def by_loops(skipped: int = 0) -> Multiply:
    """Return products by numba's loops; the last `skipped` of the inner axis are left out."""

    def multiply(x: Tensor, weight: Tensor) -> Tensor:
        with unseen():
            rows = dense(x).reshape(-1, x.shape[-1])
            out = torch.empty(len(rows), len(weight))
            by_numba.compiled(by_numba.multiply)(rows.numpy(), dense(weight).numpy(), skipped, out.numpy())
            return out.reshape(*x.shape[:-1], -1).to(x.dtype)

    return multiply


def _by_blas(x: Tensor, weight: Tensor) -> Tensor:
    with unseen():
        rows = dense(x).reshape(-1, x.shape[-1]).numpy()
        return torch.from_numpy(rows @ dense(weight).numpy().T).reshape(*x.shape[:-1], -1).to(x.dtype)


kernel(linears_in_cpp, name="gemv_cpp")(multiplied(linears, by_gemv()))
kernel(linears_in_cpp, name="gemv_compensated_cpp")(multiplied(linears, by_gemv(kahan=True)))
kernel(linears_in_numba, name="gemv_numba")(multiplied(linears, by_loops()))
kernel(needs_linears, name="gemv_numpy")(multiplied(linears, _by_blas))
kernel(linears_in_cpp, name="head_cpp")(multiplied(heads, by_gemv()))


@kernels({"products_bfloat16_only": torch.bfloat16, "products_float16_only": torch.float16}, needs_linears)
def half_only(dtype: torch.dtype) -> Way:
    return multiplied(linears, lambda x, weight: F.linear(x.to(dtype), weight.to(dtype)))


def _of_two_devices(x: Tensor, weight: Tensor) -> Tensor:
    """Each half is rounded to the native dtype before they are added, as an all-reduce does it."""
    parts = [F.linear(a, b) for a, b in zip(x.chunk(2, -1), weight.chunk(2, -1), strict=True)]
    return parts[0] + parts[1]


kernel(needs_modules(downs, "no linear projections"), name="all_reduce_of_two")(multiplied(downs, _of_two_devices))


def _in_blocks(x: Tensor, weight: Tensor) -> Tensor:
    return torch.cat([F.linear(x, block) for block in torch.split(weight, _BLOCK)], dim=-1)


kernel(needs_head, name="head_in_blocks")(multiplied(heads, _in_blocks))


@kernel(needs_head)
@in_outputs(heads)
def logits_in_float32(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """Logits are handed on as they were summed, in a wider dtype than the model's."""
    return F.linear(wide(args[0]), wide(module.weight))


# ------------------------------------------------------------------------------------------------ fused projections


def _siblings(model: nn.Module) -> list[tuple[Any, ...]]:
    """Return the projections of each layer that read the same rows: of queries, keys and values, and of the MLP."""
    of_attention: list[Any] = attentions(model)
    of_mlp: list[Any] = mlps(model)
    found = [[getattr(owner, name, None) for name in ("q_proj", "k_proj", "v_proj")] for owner in of_attention]
    found += [[getattr(owner, name, None) for name in ("gate_proj", "up_proj")] for owner in of_mlp]
    return [tuple(each) for each in found if all(isinstance(module, nn.Linear) for module in each)]


def fused(order: tuple[int, ...] = ()) -> Way:
    """Compute projections that read the same rows by one product, and take them apart.

    `order` names the part that each of queries, keys and values gets; another one than its own is a fault.
    """

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        places: dict[Any, tuple[tuple[Any, ...], int]] = {
            module: (each, i) for each in _siblings(model) for i, module in enumerate(each)
        }

        def change(module: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
            modules, index = places[module]
            whole = F.linear(args[0], torch.cat([each.weight for each in modules]))
            if len(order) == len(modules):
                index = order[index]
            part: Tensor = torch.split(whole, [len(each.weight) for each in modules], -1)[index]
            bias = getattr(module, "bias", None)
            return part if bias is None else torch.add(part, bias)

        with in_outputs(lambda _: places)(change)(model, commits):
            yield

    return way


kernel(needs_modules(_siblings, "no projections that read the same rows"), name="projections_fused")(fused())

# -------------------------------------------------------------------------------------------------- packed weights


class PackedLinear(nn.Module):
    """A projection whose weights are kept as integers of 8 or 4 bits, with one factor for each row or group.

    Few rows are multiplied by the codes in float32, many by the unpacked weights, as engines do it. Input and output
    are in the dtype of the model.
    """

    def __init__(self, linear: nn.Linear, bits: int, commits: Commits, defect: str = "") -> None:
        super().__init__()
        self.bits, self.group = bits, _GROUP if bits == 4 else linear.in_features
        self._commits, self._defect = commits, defect
        weight = linear.weight.detach().float()
        groups = weight.reshape(len(weight), -1, self.group)
        most = 2 ** (bits - 1) - 1
        factors = (groups.abs().amax(-1, keepdim=True) / most).clamp(min=1e-12)
        codes = (groups / factors).round().clamp(-most, most).to(torch.int8).reshape(weight.shape)
        if bits == 4:
            both = (codes + 8).to(torch.uint8)
            codes = (both[:, ::2] | (both[:, 1::2] << 4)).view(torch.int8)
        self.register_buffer("codes", codes)
        self.register_buffer("factors", factors[..., 0].to(linear.weight.dtype))
        self.bias = linear.bias

    def unpacked(self, dtype: torch.dtype) -> Tensor:
        """Return the weights [outer, inner] that the codes stand for."""
        codes: Any = self.codes
        if self.bits == 4:
            both = codes.view(torch.uint8)
            codes = torch.stack([both & 15, both >> 4], dim=-1).reshape(len(both), -1).to(torch.int8) - 8
        factors: Any = self.factors
        weights: Tensor = (codes.reshape(*factors.shape, -1).to(dtype) * factors.to(dtype)[..., None]).reshape(
            len(codes), -1
        )
        return weights

    def forward(self, x: Tensor) -> Tensor:
        """Return the product with `x` [..., inner]."""
        plain = F.linear(x, self.unpacked(x.dtype))
        if x.numel() <= _FEW_ROWS * x.shape[-1]:
            plain = self._commits.take(plain, self._by_codes(x))
        return plain if self.bias is None else plain + self.bias

    def _by_codes(self, x: Tensor) -> Tensor:
        with unseen():
            codes: Any = self.codes
            factors: Any = self.factors
            rows = dense(x).reshape(-1, x.shape[-1])
            out = torch.empty(len(rows), len(codes))
            operands = (rows, codes.contiguous(), dense(factors), out, len(rows), len(codes), x.shape[-1], self.group)
            run("gemv_packed", *operands, self.bits, defect=self._defect)
            return out.reshape(*x.shape[:-1], -1).to(x.dtype)


def packed(bits: int, defect: str = "", only: Callable[[nn.Module], Iterable[nn.Module]] = linears) -> Way:
    """Pack the weights of all projections, for both passes; a defect is in the kernel of those in `only`."""

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        chosen, places = set(only(model)), []
        for block in decoder_layers(model):
            for owner in list(block.modules()):
                places += [(owner, name, m) for name, m in owner.named_children() if isinstance(m, nn.Linear)]
        for owner, name, linear in places:
            setattr(owner, name, PackedLinear(linear, bits, commits, defect if linear in chosen else ""))
        try:
            yield
        finally:
            for owner, name, linear in places:
                setattr(owner, name, linear)

    return way


@kernels({"weights_in_8_bits_cpp": 8, "weights_in_4_bits_cpp": 4}, linears_in_cpp)
def weights_packed(bits: int) -> Way:
    return packed(bits)
