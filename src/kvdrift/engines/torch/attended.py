"""What attention reads, where nothing but torch's own functions can be watched.

Either `scaled_dot_product_attention` is called, and its operands are what attention reads; or scores are a product
(matmul, bmm or einsum) of queries and keys, go through a softmax, and their probabilities are multiplied with the
values. Both are seen by the functions that are called inside of one module, and by the shapes of their operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

SDPA = F.scaled_dot_product_attention
SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
_MATMUL = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm})
PRODUCTS = _MATMUL | {torch.einsum}


@dataclass(frozen=True, slots=True)
class OperandPair:
    """A product of `left` [row, head, token, n] and `right` [row, kv head, key, n or dim].

    Of queries and keys, n is the dimension of a head, and `right` has its keys in the last axis but one; of
    probabilities and values, n is the number of keys, and `right` are the values [row, kv head, key, dim].
    """

    left: Tensor
    right: Tensor


def scores_product(func: Any, args: tuple[Any, ...], n_rows: int, q_len: int) -> OperandPair | None:
    """Return queries and keys of a call that may make the scores of `q_len` tokens, None for any other call."""
    found = _operands(func, args)
    if found is None:
        return None
    left, right = _four(found[0], n_rows), _four(found[1].mT, n_rows)
    if left is None or right is None or left.shape[2] != q_len or left.shape[3] != right.shape[3]:
        return None
    if right.shape[2] < q_len or left.shape[1] % right.shape[1]:
        return None
    return OperandPair(left, right)


def values_product(func: Any, args: tuple[Any, ...], n_rows: int, q_len: int, n_keys: int) -> OperandPair | None:
    """Return probabilities and values of a call that may make the context of `q_len` tokens, None for any other."""
    found = _operands(func, args)
    if found is None:
        return None
    left, right = _four(found[0], n_rows), _four(found[1], n_rows)
    if left is None or right is None or left.shape[2] != q_len:
        return None
    if left.shape[3] != n_keys or right.shape[2] != n_keys or left.shape[1] % right.shape[1]:
        return None
    return OperandPair(left, right)


def by_head(context: Tensor, product: OperandPair) -> Tensor | None:
    """Return what a product gave, [row, token, head, dim], None if it has another size."""
    rows, heads, tokens, _ = product.left.shape
    dim = product.right.shape[3]
    if context.numel() != rows * heads * tokens * dim or context.ndim < 3:
        return None
    return context.reshape(rows, heads, tokens, dim).transpose(1, 2)


def with_copy(func: Any, args: tuple[Any, ...], index: int) -> tuple[Any, ...]:
    """Return the arguments of a product with a copy of the operand `index`, which may be written to."""
    place = index + (func is torch.einsum)
    return (*args[:place], args[place].clone(), *args[place + 1 :])


def _operands(func: Any, args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Return the two operands [..., token, n] and [..., n, m] of a product of matrices."""
    if func is torch.einsum:
        return _of_einsum(args)
    if func not in _MATMUL or len(args) != 2 or not all(isinstance(arg, Tensor) and arg.ndim >= 3 for arg in args):
        return None
    return args[0], args[1]


def _letters(args: tuple[Any, ...]) -> tuple[str, str, str]:
    left, _, rest = args[0].replace(" ", "").partition(",")
    right, _, out = rest.partition("->")
    return left, right, out


def _of_einsum(args: tuple[Any, ...]) -> tuple[Tensor, Tensor] | None:
    """Return the operands of an einsum of two tensors as those of a matmul."""
    if len(args) != 3 or not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return None
    left, right, out = _letters(args)
    second = args[2]
    for letter in [letter for letter in right if letter not in left + out and len(right) == second.ndim]:
        if second.shape[right.index(letter)] != 1:
            return None
        second, right = second.squeeze(right.index(letter)), right.replace(letter, "")
    summed = [letter for letter in left if letter in right and letter not in out]
    rows = [letter for letter in left if letter not in right and letter in out]
    columns = [letter for letter in right if letter not in left and letter in out]
    if len(summed) != 1 or not rows or len(columns) != 1:
        return None
    shared = [letter for letter in left if letter in right and letter in out]
    of_left = [*shared, *rows, summed[0]]
    of_right = [*shared, summed[0], columns[0]]
    if sorted(of_left) != sorted(left) or sorted(of_right) != sorted(right) or not shared:
        return None
    first = args[1].permute([left.index(letter) for letter in of_left])
    second = second.permute([right.index(letter) for letter in of_right])
    return first, _beside(second, len(of_left))


def _beside(second: Tensor, n_axes: int) -> Tensor:
    """Give a right operand without an axis for heads one of length 1, behind that of rows."""
    while second.ndim < n_axes:
        second = second.unsqueeze(-3)
    return second


def _four(tensor: Tensor, n_rows: int) -> Tensor | None:
    """Return [row, head, ..., ...] of an operand that may have its heads in one axis with the rows, or in two."""
    if tensor.ndim == 4 and tensor.shape[0] == n_rows:
        return tensor
    if tensor.ndim == 3 and tensor.shape[0] % n_rows == 0:
        return tensor.reshape(n_rows, -1, *tensor.shape[1:])
    if tensor.ndim == 5 and tensor.shape[0] == n_rows:
        return tensor.flatten(1, 2)
    return None


class AttentionSeen(TorchFunctionMode):
    """Tells `heard` of the operands (query, key, value) of each attention call, for a survey of `n_tokens` tokens."""

    def __init__(self, n_tokens: int, heard: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        super().__init__()
        self._n_tokens, self._heard = n_tokens, heard
        self._product: OperandPair | None = None
        self._scores: tuple[OperandPair, int] | None = None  # with its number of keys

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is SDPA:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].ndim == 4 and given["query"].shape[0] == 1:
                self._heard(given["query"], given["key"], given["value"])
        elif func in PRODUCTS:
            if self._scores is not None:
                product = values_product(func, args, 1, self._n_tokens, self._scores[1])
                if product is not None:
                    self._heard(self._scores[0].left, self._scores[0].right, product.right)
                    self._scores = self._product = None
                    return func(*args, **kwargs)
            self._product = scores_product(func, args, 1, self._n_tokens) or self._product
        elif func in SOFTMAX and self._product is not None:
            scores = args[0] if args else kwargs["input"]
            n_keys = self._product.right.shape[2]
            if scores.shape[-1] in (n_keys, n_keys + 1):  # one more is a sink's
                self._scores = self._product, n_keys
        return func(*args, **kwargs)


__all__ = ["AttentionSeen", "OperandPair", "by_head", "scores_product", "values_product", "with_copy"]
