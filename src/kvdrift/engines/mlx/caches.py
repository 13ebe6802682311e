"""The caches of mlx-lm: which kinds there are, which rows they hand to attention, and whether they go back."""

from __future__ import annotations

from typing import Any

import numpy as np
from mlx_lm.models import cache as caches

from kvdrift.errors import UsageError
from kvdrift.trace.model import Slots

KINDS = ("default", "batch", "quantized", "rotating", "chunked")
_WINDOW = 8  # slots of a rotating cache, and of a chunk: shorter than a usual prompt
_GROUP, _BITS = 32, 8


def new_cache(model: Any, kind: str) -> list[Any]:
    """Return the empty caches of all layers: those that the model makes itself, and of another kind where it would make
    plain ones. What is no plain cache (states, windows of the model's own) stays what it is, but for a batch.

    Raises:
        UsageError: the kind is unknown.
    """
    if kind not in KINDS:
        raise UsageError(f"unknown cache kind {kind!r}; use --cache with one of {', '.join(KINDS)}")
    return [_of_kind(each, kind) for each in caches.make_prompt_cache(model)]


def _of_kind(cache: Any, kind: str) -> Any:
    if kind == "batch" and type(cache) is caches.RotatingKVCache:
        return caches.BatchRotatingKVCache(cache.max_size, [0])
    if type(cache) is not caches.KVCache:
        return cache
    if kind == "batch":
        return caches.BatchKVCache([0])
    if kind == "quantized":
        return caches.QuantizedKVCache(group_size=_GROUP, bits=_BITS)
    if kind == "rotating":
        return caches.RotatingKVCache(max_size=_WINDOW)
    if kind == "chunked":
        return caches.ChunkedKVCache(_WINDOW)
    return cache


def why_no_rewind(cache: list[Any]) -> str | None:
    """Say why tokens cannot be dropped from these caches, None if they can."""
    for layer, each in enumerate(cache):
        name = type(each).__name__
        if hasattr(each, "max_size"):
            return f"layer {layer} has a {name}, a ring whose overwritten rows cannot come back"
        if not each.is_trimmable():
            return f"layer {layer} has a {name}, which cannot be trimmed"
    return None


def slots_of(cache: Any, n_keys: int, q_len: int, length: int) -> Slots:
    """Return the logical position of each key that attention is handed, when `length` tokens are in the cache.

    A ring keeps its first `keep` rows, and is overwritten behind them one token at a time; a call of several tokens
    puts it in order.
    """
    keep = int(getattr(cache, "keep", 0) or 0)
    newest = np.arange(length - n_keys, length, dtype=np.int64)
    if n_keys >= length or not hasattr(cache, "max_size"):
        return newest
    newest[:keep] = np.arange(keep)
    if q_len > 1:
        return newest
    behind = int(cache._idx)
    return np.concatenate([newest[:keep], np.roll(newest[keep:], behind - keep)])


__all__ = ["KINDS", "new_cache", "slots_of", "why_no_rewind"]
