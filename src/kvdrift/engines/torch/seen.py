"""Which attention calls of torch a short survey of a model sees."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kvdrift.engines.torch.attended import PRODUCTS, SDPA, SOFTMAX, OperandPair, scores_product, values_product
from kvdrift.engines.torch.scored import scored_by

Heard = Callable[[Tensor, Tensor, Tensor, Tensor | None], None]


class AttentionSeen(TorchFunctionMode):
    """Tells `heard` of each attention call in a survey of `n_tokens` tokens: its query, key and value, [1, head, token,
    dim], and what it gives, [1, token, head, dim]."""

    def __init__(self, n_tokens: int, heard: Heard) -> None:
        super().__init__()
        self._n_tokens, self._heard = n_tokens, heard
        self._products: list[OperandPair] = []
        self._scored: OperandPair | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        out = func(*args, **kwargs)
        if func is SDPA:
            given = dict(zip(("query", "key", "value"), args, strict=False)) | kwargs
            if given["query"].ndim == 4 and given["query"].shape[0] == 1:
                self._heard(given["query"], given["key"], given["value"], out.transpose(1, 2))
        elif func in PRODUCTS:
            self._product(func, args, kwargs, out)
        elif func in SOFTMAX and self._products:
            scores = args[0] if args else kwargs["input"]
            with torch._C.DisableTorchFunction():
                scored = scored_by(self._products, scores) if scores.ndim >= 3 else None
            self._scored = None if scored is None else scored.pair
        return out

    def _product(self, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Tensor) -> None:
        scored = self._scored
        if scored is not None:
            found = values_product(func, args, kwargs, 1, scored)
            if found is not None and found.right.shape[2] == scored.right.shape[2]:
                context = found.arranged(out)
                self._heard(
                    scored.left, scored.right, found.right, None if context is None else context.transpose(1, 2)
                )
                self._scored = None
                self._products.clear()
                return
        pair = scores_product(func, args, kwargs, 1, self._n_tokens)
        self._products += [] if pair is None else pair.readings(self._n_tokens)
        del self._products[:-8]


__all__ = ["AttentionSeen"]
