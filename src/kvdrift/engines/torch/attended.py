"""What attention reads, where nothing but torch's own functions can be watched.

Either `scaled_dot_product_attention` is called, and its operands are what attention reads; or scores are a product
(matmul, bmm, baddbmm or einsum) of queries and keys, go through a softmax, and their probabilities are multiplied with
the values. Both are seen by the functions that are called inside of one module, and by the shapes of their operands.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kvdrift.engines.torch.masks import least_score

SDPA = F.scaled_dot_product_attention
SOFTMAX = frozenset({F.softmax, torch.softmax, Tensor.softmax, torch.special.softmax})
# What is left of a sum of weights that a product takes: roundings of 16 bits, and not another operand.
_NO_SUM = 2.0**-4
_MATMUL = frozenset({torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.bmm, Tensor.bmm, torch.mm, Tensor.mm})
_ADDED = frozenset({torch.baddbmm, Tensor.baddbmm})
PRODUCTS = _MATMUL | _ADDED | {torch.einsum}


@dataclass(frozen=True, slots=True)
class OperandPair:
    """A product of `left` [row, head, token, n] and `right` [row, kv head, key, n or dim].

    Of queries and keys, n is the dimension of a head, and `right` has its keys in the last axis but one; of
    probabilities and values, n is the number of keys, and `right` are the values [row, kv head, key, dim].

    Attributes:
        order: the axes of what the product gives in the order row, head, token, last; None if they have that order.
        group: query heads of a kv head that stand in the axis of tokens of what the product gives; 1 if none do.
        tokens_first: whether the heads of one token are neighbours in that axis, and not the tokens of one head.
        padding: rows of zeros behind those of the tokens that fill a tile, which `left` is without.
        is_flipped: whether the call multiplied `right` by `left`, so that what it gives has keys or features in its
            last axis but one, and tokens in the last.
        place: how many such products came before it in its module.
    """

    left: Tensor
    right: Tensor
    order: tuple[int, ...] | None = None
    group: int = 1
    tokens_first: bool = False
    padding: int = 0
    is_flipped: bool = False
    place: int = 0

    def arranged(self, given: Tensor) -> Tensor | None:
        """Return what the product gave, or what was made of it element by element or along its last axis, as [row,
        head, token, last]; None if it has another size."""
        rows, heads, tokens = self.left.shape[:3]
        given = given.mT if self.is_flipped else given
        last = given.shape[-1]
        if self.padding:
            if given.numel() != rows * heads * (tokens + self.padding) * last:
                return None
            return given.reshape(rows, heads, -1, last)[:, :, :tokens]
        if given.numel() != rows * heads * tokens * last:
            return None
        if self.order is not None and given.ndim == len(self.order):
            given = given.permute(self.order)
        if self.group > 1:
            given = self.unpacked(given.reshape(rows, heads // self.group, -1, last))
        return given.reshape(rows, heads, tokens, last)

    def unpacked(self, given: Tensor) -> Tensor:
        """Return [row, kv head, query heads of tokens, last] as [row, head, token, last]."""
        return _unpacked(given, self.left.shape[2], self.tokens_first)

    def readings(self, q_len: int) -> list[OperandPair]:
        """Return this pair with its `q_len` tokens in their own axis, in each way in which they may stand there."""
        tokens = self.left.shape[2]
        if tokens == q_len:
            return [self]
        if tokens % q_len or self.left.shape[1] != self.right.shape[1] or self.order is not None:
            return []
        ways = (False, True) if q_len > 1 else (False,)
        return [self.read_as(tokens // q_len, tokens_first) for tokens_first in ways]

    def read_as(self, group: int, tokens_first: bool) -> OperandPair:
        """Return this pair with so many heads taken out of the axis of its tokens."""
        tokens = self.left.shape[2] // group
        left = _unpacked(self.left, tokens, tokens_first)
        return replace(self, left=left, group=group, tokens_first=tokens_first)


def _unpacked(packed: Tensor, tokens: int, tokens_first: bool) -> Tensor:
    """Return [row, head, token, n] of [row, kv head, heads of it and tokens, n]."""
    rows, kv_heads, _, last = packed.shape
    if tokens_first:
        return packed.reshape(rows, kv_heads, tokens, -1, last).transpose(2, 3).flatten(1, 2)
    return packed.reshape(rows, -1, tokens, last)


def scores_product(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], n_rows: int, q_len: int, *, is_flipped: bool = False
) -> OperandPair | None:
    """Return queries and keys of a call that may make the scores of `q_len` tokens, None for any other call.

    The query heads that share a kv head may stand in the axis of tokens; see `OperandPair.readings`. With `is_flipped`
    the call multiplies keys by queries.
    """
    found = _operands(func, args, kwargs, q_len, n_rows, is_flipped)
    if found is None:
        return None
    left, right = _four(found.left, n_rows), _four(found.right.mT, n_rows)
    padding = 0 if left is None or found.order is not None else rows_of_padding(left, q_len)
    if left is not None and padding:
        left = left[:, :, :q_len]
    if left is None or right is None or left.shape[2] % q_len or left.shape[3] != right.shape[3]:
        return None
    if right.shape[2] < 1 or left.shape[1] % right.shape[1]:
        return None
    pair = OperandPair(left, right, found.order, padding=padding, is_flipped=is_flipped)
    return pair if pair.readings(q_len) else None


def axis_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> int:
    """The axis of a softmax, the last one where it names none."""
    axis = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    return axis if isinstance(axis, int) else -1


def along(products: Sequence[OperandPair], scores: Tensor, axis: int) -> list[OperandPair]:
    """Those products whose keys a softmax of `scores` along an axis runs over."""
    from_last = scores.ndim - 1 - axis % max(1, scores.ndim)
    return [pair for pair in products if from_last == int(pair.is_flipped)]


def packed_pair(query: Tensor, key: Tensor, mask: Tensor | None, q_len: int, n_heads: int | None) -> OperandPair | None:
    """Return queries and keys of a fused call whose query heads of a kv head stand in the axis of tokens, None if they
    do not, or if nothing tells in which order: of several tokens the mask does."""
    heads, rows = query.shape[1:3]
    group = rows // q_len
    if group < 2 or rows % q_len or heads != key.shape[1] or (n_heads is not None and n_heads % (heads * group)):
        return None
    readings = OperandPair(query, key).readings(q_len)
    if q_len == 1:
        return readings[0]
    if mask is None or mask.ndim < 2 or mask.shape[-2] != rows:
        return None
    seen = mask if mask.dtype == torch.bool else mask > least_score(mask.dtype)
    seen = seen.reshape((1,) * (4 - seen.ndim) + seen.shape)
    return next((pair for pair in readings if is_readable(pair, pair.unpacked(seen))), None)


def is_readable(pair: OperandPair, visible: Tensor) -> bool:
    """Whether tokens that share an axis with heads are told from them by what is `visible` [row, head, token, key]:
    what a token sees, all heads of it see, and not all tokens see the same."""
    if pair.group == 1 or visible.shape[2] == 1:
        return True
    same = bool((visible == visible[:, :1]).all())
    return same and not bool((visible == visible[:, :, :1]).all())


def values_product(
    func: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    n_rows: int,
    scored: OperandPair,
    *,
    is_flipped: bool = False,
) -> OperandPair | None:
    """Return probabilities and values of a call that may make the context of the tokens of `scored`, of some of its
    keys or of all, None for any other. With `is_flipped` the call multiplies values by probabilities."""
    tokens = scored.left.shape[2]
    found = _operands(func, args, kwargs, tokens, n_rows, is_flipped)
    if found is None:
        return None
    left, right = _four(found.left, n_rows), _four(found.right, n_rows)
    if left is not None and scored.padding and left.shape[2] == tokens + scored.padding:
        left = left[:, :, :tokens]
    if left is None or right is None or left.shape[2] != tokens * scored.group:
        return None
    if left.shape[3] != right.shape[2] or right.shape[2] > scored.right.shape[2] or left.shape[1] % right.shape[1]:
        return None
    pair = OperandPair(left, right, found.order, padding=scored.padding, is_flipped=is_flipped)
    return pair if scored.group == 1 else pair.read_as(scored.group, scored.tokens_first)


def takes_weights(pair: OperandPair, query: Tensor, weights: Sequence[Tensor]) -> bool:
    """Whether what `values_product` found takes values, and is not one more product of queries and keys.

    Where it takes as many keys as a head has dimensions, both have one shape, and layers that subtract one map of
    attention from another make several. The left operand of such a product is no view of the `query` [row, head, token,
    dim], and holds no number below zero, whatever it was multiplied by for each key; or it is a sum of `weights`, each
    [row, head, token, key] of its keys, that softmaxes gave before: of its own head, or of all of them where there are
    keys enough to tell. NaN and infinity tell nothing.
    """
    left = pair.left
    if left.shape != query.shape:
        return True
    if left.untyped_storage().data_ptr() == query.untyped_storage().data_ptr():
        return False
    known = [each.double() for each in weights if each.shape == left.shape]
    if bool((left >= 0.0).all()) or not known or not all(bool(each.isfinite().all()) for each in (left, *known)):
        return True
    rows, heads, tokens, n_keys = left.shape
    # [row, token, head, key, one of the softmaxes], and the same of all heads for each of them
    own = torch.stack(known, -1).permute(0, 2, 1, 3, 4)
    all_heads = own.permute(0, 1, 3, 2, 4).reshape(rows, tokens, 1, n_keys, -1)
    given = all_heads.expand(-1, -1, heads, -1, -1) if 2 * all_heads.shape[-1] <= n_keys else own
    wanted = left.double().permute(0, 2, 1, 3)[..., None]
    off = given @ (torch.linalg.pinv(given) @ wanted) - wanted
    return bool(off.norm() <= _NO_SUM * wanted.norm())


def rows_of_padding(query: Tensor, q_len: int) -> int:
    """Return how many rows of zeros a query [row, head, token, dim] has behind its `q_len` tokens; 0 if others are not
    zero: several heads may stand in the axis of tokens."""
    behind = query[:, :, q_len:]
    return behind.shape[2] if behind.shape[2] and not bool(behind.any()) else 0


def with_written(
    func: Any,
    args: tuple[Any, ...],
    index: int,
    find: Callable[[tuple[Any, ...]], OperandPair | None],
    values: Tensor,
    *,
    is_flipped: bool = False,
) -> tuple[Any, ...]:
    """Return the arguments of a product with a copy of the operand `index` that holds `values`, which have the shape
    that `find` gives that operand; of one that `is_flipped`, the other operand comes first."""
    place = (1 - index if is_flipped else index) + (func is torch.einsum or func in _ADDED)
    given = args[place]
    numbers = torch.arange(given.numel(), device=given.device).reshape(given.shape)
    pair = find((*args[:place], numbers, *args[place + 1 :]))
    assert pair is not None
    written, at = given.flatten().clone(), (pair.left, pair.right)[index]
    if index == 0:
        at = at[:, :, : values.shape[2]]  # numbers of rows of padding are no zeros
    written[at.flatten()] = values.flatten()
    return (*args[:place], written.reshape(given.shape), *args[place + 1 :])


@dataclass(frozen=True, slots=True)
class _Operands:
    """The operands [..., token, n] and [..., n, m] of a product, and the order of axes of `OperandPair`."""

    left: Tensor
    right: Tensor
    order: tuple[int, ...] | None = None


def _operands(
    func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], q_len: int, n_rows: int, is_flipped: bool
) -> _Operands | None:
    """Return the two operands of a product of matrices; of one that `is_flipped`, those of its transpose."""
    if is_flipped:
        if func not in _MATMUL or len(args) != 2 or kwargs or not _are_matrices(args, n_rows):
            return None
        return _operands(torch.matmul, (args[1].mT, args[0].mT), {}, q_len, n_rows, False)
    if func is torch.einsum:
        return None if kwargs else _of_einsum(args, q_len)
    if func in _ADDED:
        if kwargs.keys() - {"alpha", "beta"} or len(args) != 3:
            return None
        args = args[1:]
    elif func not in _MATMUL or len(args) != 2 or kwargs:
        return None
    if not _are_matrices(args, n_rows):
        return None
    # Two matrices are those of one head, of one row.
    first, second = args if args[0].ndim > 2 else (args[0][None], args[1][None])
    return _Operands(first, second)


def _are_matrices(args: tuple[Any, ...], n_rows: int) -> bool:
    if not all(isinstance(arg, Tensor) for arg in args):
        return False
    axes = {arg.ndim for arg in args}
    return min(axes) >= 3 or (axes == {2} and n_rows == 1)


def _letters(args: tuple[Any, ...]) -> tuple[str, str, str]:
    left, _, rest = args[0].replace(" ", "").partition(",")
    right, _, out = rest.partition("->")
    return left, right, out


def _of_einsum(args: tuple[Any, ...], q_len: int) -> _Operands | None:
    """Return the operands of an einsum of two tensors as those of a matmul."""
    if len(args) != 3 or not isinstance(args[0], str) or "..." in args[0] or "->" not in args[0]:
        return None
    left, right, out = _letters(args)
    first, second = args[1:]
    for letter in [letter for letter in right if letter not in left + out and len(right) == second.ndim]:
        if second.shape[right.index(letter)] != 1:
            return None
        second, right = second.squeeze(right.index(letter)), right.replace(letter, "")
    summed = [letter for letter in left if letter in right and letter not in out]
    rows = [letter for letter in left if letter not in right and letter in out]
    columns = [letter for letter in right if letter not in left and letter in out]
    shared = [letter for letter in left if letter in right and letter in out]
    if len(summed) != 1 or not rows or len(columns) != 1 or not shared:
        return None
    token = _token_letter(left, rows, shared, dict(zip(left, first.shape, strict=False)), q_len)
    if token is None:
        return None
    of_left = [*shared, *(letter for letter in rows if letter != token), token, summed[0]]
    of_right = [*shared, summed[0], columns[0]]
    order = [*of_left[:-1], columns[0]]
    if sorted(of_left) != sorted(left) or sorted(of_right) != sorted(right) or sorted(order) != sorted(out):
        return None
    first = first.permute([left.index(letter) for letter in of_left])
    second = second.permute([right.index(letter) for letter in of_right])
    return _Operands(first, _beside(second, len(of_left)), tuple(out.index(letter) for letter in order))


def _token_letter(left: str, rows: list[str], shared: list[str], sizes: dict[str, int], q_len: int) -> str | None:
    """The letter of the axis that counts tokens, None if nothing tells: of several that are as long, none that follows
    upon the letter of kv heads, whose groups it counts."""
    found = [letter for letter in rows if sizes[letter] == q_len]
    if len(found) > 1:
        behind = {left[left.index(letter) + 1] for letter in shared[1:] if letter != left[-1]}
        found = [letter for letter in found if letter not in behind]
    return found[0] if len(found) == 1 else None


def _beside(second: Tensor, n_axes: int) -> Tensor:
    """Give a right operand without an axis for heads one of length 1, behind that of rows."""
    while second.ndim < n_axes:
        second = second.unsqueeze(-3)
    return second


def _four(tensor: Tensor, n_rows: int) -> Tensor | None:
    """Return [row, head, ..., ...] of an operand that may have its heads in one axis with the rows, in two, or no axis
    for a single row."""
    if tensor.ndim == 4 and tensor.shape[0] == n_rows:
        return tensor
    if tensor.ndim == 3 and tensor.shape[0] % n_rows == 0:
        return tensor.reshape(n_rows, -1, *tensor.shape[1:])
    if tensor.ndim == 5 and tensor.shape[0] == n_rows:
        return tensor.flatten(1, 2)
    if tensor.ndim == 4 and n_rows == 1:
        return tensor.flatten(0, 1)[None]
    return None


__all__ = [
    "PRODUCTS",
    "SDPA",
    "SOFTMAX",
    "OperandPair",
    "along",
    "axis_of",
    "is_readable",
    "packed_pair",
    "rows_of_padding",
    "scores_product",
    "takes_weights",
    "values_product",
    "with_written",
]
