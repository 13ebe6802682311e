"""Which attention calls of torch a short survey of a model sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvdrift.engines.torch.attended import (
    PRODUCTS,
    SDPA,
    SOFTMAX,
    OperandPair,
    along,
    axis_of,
    packed_pair,
    scores_product,
    values_product,
)
from kvdrift.engines.torch.scored import scored_by
from kvdrift.engines.torch.shown import ShownKernel


class BatchRow(NamedTuple):
    """The row of a batch that a survey is about, of how many."""

    row: int = 0
    n_rows: int = 1

    def of(self, tensor: Tensor) -> Tensor:
        """Return [1, ...] of what has one row for each of the batch; other tensors as they are."""
        is_batch = self.n_rows > 1 and tensor.ndim > 1 and tensor.shape[0] == self.n_rows
        return tensor[self.row : self.row + 1] if is_batch else tensor


Heard = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class AttentionSeen(TorchFunctionMode):
    """Tells `heard` of each attention call in a survey of `n_tokens` tokens: its query, key and value, [1, head, token,
    dim], and what it gives, [1, token, head, dim]."""

    def __init__(self, n_tokens: int, heard: Heard, at: BatchRow = BatchRow()) -> None:  # noqa: B008
        super().__init__()
        self._n_tokens, self._heard, self._at = n_tokens, heard, at
        self._products: list[OperandPair] = []
        self._scored: OperandPair | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func.kernel(*args, **kwargs) if isinstance(func, ShownKernel) else func(*args, **kwargs)
        if isinstance(func, ShownKernel):
            if all(each.ndim == 4 and each.shape[0] == self._at.n_rows for each in args[:3]):
                self._tell(args[0], args[1], args[2], out)
        elif func is SDPA:
            given = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
            query, key, value = (given[name] for name in ("query", "key", "value"))
            if query.ndim == key.ndim == value.ndim == 3 and len(query) > 1:  # heads of the one row
                query, key, value = query[None], key[None], value[None]
            if query.ndim == 4 and query.shape[0] == self._at.n_rows:
                with torch._C.DisableTorchFunction():
                    packed = None
                    if query.shape[2] != self._n_tokens and not given.get("is_causal"):
                        packed = packed_pair(query, key, given.get("attn_mask"), self._n_tokens, None)
                    pair = OperandPair(query, key) if packed is None else packed
                    context = pair.arranged(out)
                    self._tell(pair.left, key, value, context)
        elif func in PRODUCTS:
            self._product(func, args, kwargs, out)
        elif func in SOFTMAX and self._products:
            scores = args[0] if args else kwargs["input"]
            with torch._C.DisableTorchFunction():
                products = along(self._products, scores, axis_of(args, kwargs))
                scored = scored_by(products, scores) if scores.ndim >= 3 else None
            self._scored = None if scored is None else scored.pair
        return out

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> None:
        if not all(isinstance(each, Tensor) and each.ndim >= 3 for each in args[-2:]):
            return  # of two matrices alone nothing tells that they belong to heads
        scored = self._scored
        for is_flipped in (False, True) if scored is not None else ():
            assert scored is not None
            found = values_product(func, args, kwargs, self._at.n_rows, scored, is_flipped=is_flipped)
            if found is not None and found.right.shape[2] == scored.right.shape[2]:
                self._tell(scored.left, scored.right, found.right, found.arranged(out))
                self._scored = None
                self._products.clear()
                return
        for is_flipped in (False, True):
            pair = scores_product(func, args, kwargs, self._at.n_rows, self._n_tokens, is_flipped=is_flipped)
            self._products += [] if pair is None else pair.readings(self._n_tokens)
        del self._products[:-8]

    def _tell(self, query: Tensor, key: Tensor, value: Tensor, context: Tensor | None) -> None:
        """Tell of a call, as far as its own row goes; `context` is [row, head, token, dim]."""
        rows = [self._at.of(each) for each in (query, key, value)]
        self._heard(rows[0], rows[1], rows[2], None if context is None else self._at.of(context).transpose(1, 2))


__all__ = ["AttentionSeen", "BatchRow"]
