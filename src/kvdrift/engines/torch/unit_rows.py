"""The matrix of a module whose weights cannot be read, measured with unit rows that are sent through it.

A layer for packed weights, of whatever form, is a product: `f(x) = W x + b`. So `f` of the rows of a unit matrix gives
`W`, rounded to the dtype of the result, and `f` of a zero row gives `b`. Many rows go in together, as in a prefill.
Rows that are rounded to 8 bits on the fly are not disturbed, since a unit row is one number.

What was measured is believed only if it gives what the module gave in a prefill. Activations that are quantised leave
a few hundredths over; a module that is no product leaves as much as its result is large.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.engines.torch.linear import UnknownWeight, row_of
from kvdrift.engines.torch.weights import own_matrices

CONVOLUTIONS: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d)  # they take several rows for one
_ROWS = 256  # unit rows that are sent together
_LARGER = 64.0  # times the largest bias, so that the bias does not drown the weights
_LEFT_OVER = 0.125  # the most of a prefill's row that activations in eight bits leave over; in four it is 0.1
_NO_PRODUCT = "what it computes is not a product of its row with a matrix"


def may_be_product(module: nn.Module) -> bool:
    """Whether a module that is of no known kind may be a product: it holds numbers of a matrix itself."""
    if isinstance(module, (nn.Embedding, *CONVOLUTIONS)):
        return False
    return any(True for _ in own_matrices(module))


def measured_product(module: nn.Module, x: Tensor, n_axes: int) -> tuple[Tensor, Tensor]:
    """Return W x + b for the rows `x` [row, in], and the root of the sum of its squared terms, as `exact_product` does.

    `n_axes` is how many axes the module's input has: [token, in] or [1, token, in].

    Raises:
        UnknownWeight: the module fails on unit rows, or gives none for each.
    """
    bias = _sent(module, x.new_zeros(2, x.shape[1]), n_axes)[0].double()
    size = 2.0 ** math.ceil(math.log2(max(1.0, _LARGER * float(bias.abs().max())))) if bool(bias.any()) else 1.0
    operand = x.double()
    reference = bias.expand(len(x), -1).clone()
    squares = bias.square().expand(len(x), -1).clone()
    for start in range(0, x.shape[1], _ROWS):
        columns = torch.arange(start, min(start + _ROWS, x.shape[1]), device=x.device)
        rows = x.new_zeros(max(2, len(columns)), x.shape[1])  # no single row, which is a decode step
        rows[torch.arange(len(columns), device=x.device), columns] = size
        weights = (_sent(module, rows, n_axes)[: len(columns)].double() - bias) / size
        reference += operand[:, columns] @ weights
        squares += operand[:, columns].square() @ weights.square()
    return reference, squares.sqrt()


def require_product(y: Tensor, reference: Tensor, spread: Tensor) -> None:
    """Raise where the rows `y` of a prefill [row, out] are not what was measured.

    Raises:
        UnknownWeight: they are not.
    """
    if y.shape != reference.shape:
        raise UnknownWeight(_NO_PRODUCT)
    left = (y.double() - reference).norm(dim=1)
    size = torch.hypot(reference, spread).norm(dim=1)
    if not bool((left <= _LEFT_OVER * size).all()):
        raise UnknownWeight(_NO_PRODUCT)


def _sent(module: nn.Module, rows: Tensor, n_axes: int) -> Tensor:
    """What the module gives for `rows` [row, in], as [row, out]."""
    given: Any = rows if n_axes == 2 else rows[None]
    try:
        found = row_of(module(given))
        found = None if found is None else found.detach()
    except Exception as error:
        raise UnknownWeight(f"it fails on unit rows, with a {type(error).__name__}") from error
    if found is None or found.shape[:-1] != given.shape[:-1] or not bool(torch.isfinite(found).all()):
        raise UnknownWeight(_NO_PRODUCT)
    return found.reshape(len(rows), -1)


__all__ = ["CONVOLUTIONS", "may_be_product", "measured_product", "require_product"]
