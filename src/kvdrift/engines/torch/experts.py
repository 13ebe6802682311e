"""Experts whose weights are one tensor each, [expert, out, in], as transformers keeps them, in exact arithmetic.

Which experts a token goes to, and with which weights, is what the call was given: the choice of the router is that of
each pass. The function between the two products is the module's own, in float64.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.linear import multiply

# Draws of what roundings before the gate do behind it, and by what they are changed, relative.
_DRAWS, _STEP = 8, 1e-6
# Roundings behind the gate, of its own product, and of what an expert adds: the sum, its weight, the last sum.
_BEHIND_GATE, _BEHIND_SUM = 2.0, 2.0


class Routed(NamedTuple):
    """The experts [row, choice] of some rows and their weights, of the same shape."""

    experts: Tensor
    weights: Tensor


def are_experts(module: Any) -> bool:
    """Whether a module says of itself how its experts are kept, as those of transformers 5 do."""
    told = all(hasattr(module, name) for name in ("has_gate", "has_bias", "is_transposed", "_apply_gate", "down_proj"))
    if not told or not isinstance(module, nn.Module):
        return False
    kept = (_first_name(module), "down_proj")
    found = [getattr(module, name, None) for name in kept]
    return all(
        isinstance(item, Tensor) and item.ndim == 3 and item.is_floating_point() and item.element_size() >= 2
        for item in found
    )


def choice_of(values: Iterable[Any], n_rows: int) -> Routed | None:
    """Return the choice that is among the arguments of a call, for `n_rows` rows; None if it cannot be told."""
    found = [value for value in values if isinstance(value, Tensor) and value.ndim == 2 and len(value) == n_rows]
    chosen = [value for value in found if not value.is_floating_point() and value.dtype != torch.bool]
    weights = [value for value in found if value.is_floating_point() and chosen and value.shape == chosen[0].shape]
    return Routed(chosen[0], weights[-1]) if len(chosen) == 1 and weights else None


def exact_experts(module: Any, x: Tensor, choice: Routed) -> tuple[Tensor, Tensor]:
    """Return what the experts give for rows `x` [row, in] in float64, and the root of the sum of squares of what each
    rounding inside of them moves it by, both [row, out]."""
    down = module.down_proj
    n_out = down.shape[2 if module.is_transposed else 1]
    reference = x.new_zeros(len(x), n_out, dtype=torch.float64)
    squares = torch.zeros_like(reference)
    for expert in sorted(set(choice.experts.flatten().tolist())):
        if not 0 <= expert < len(down):
            continue  # those of other machines are marked so
        rows, slot = torch.where(choice.experts == expert)
        out, terms = _of_expert(module, _first_name(module), expert, x[rows].double())
        gate = module._apply_gate if module.has_gate else module.act_fn
        inner = gate(out)
        of_inner = _behind(gate, out, torch.hypot(out, terms.sqrt())) + _BEHIND_GATE * inner.square()
        found, of_sum = _of_expert(module, "down_proj", expert, inner)
        _, through = multiply(_matrix(module, "down_proj", expert), of_inner.sqrt())
        weight = choice.weights[rows, slot, None].double()
        reference.index_add_(0, rows, weight * found)
        squares.index_add_(0, rows, weight.square() * (of_sum + through + _BEHIND_SUM * found.square()))
    return reference, squares.sqrt()


def _first_name(module: Any) -> str:
    return "gate_up_proj" if module.has_gate else "up_proj"


def _matrix(module: Any, name: str, expert: int) -> Tensor:
    weight: Tensor = getattr(module, name)[expert].detach()
    return weight.T if module.is_transposed else weight


def _of_expert(module: Any, name: str, expert: int, x: Tensor) -> tuple[Tensor, Tensor]:
    """A product of one expert, and the sum of its squared terms."""
    found, squares = multiply(_matrix(module, name, expert), x)
    if module.has_bias:
        bias = getattr(module, f"{name}_bias")[expert].double()
        found, squares = found + bias, squares + bias.square()
    return found, squares


def _behind(gate: Any, out: Tensor, sizes: Tensor) -> Tensor:
    """The mean square of what errors as large as `sizes` before the gate are behind it."""
    generator = torch.Generator().manual_seed(1)
    total: Tensor | float = 0.0
    for _ in range(_DRAWS):
        moved = _STEP * sizes * torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device)
        total = total + ((gate(out + moved) - gate(out - moved)) / (2.0 * _STEP)).square()
    return torch.as_tensor(total) / _DRAWS


__all__ = ["Routed", "are_experts", "choice_of", "exact_experts"]
