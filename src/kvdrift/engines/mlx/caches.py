"""The caches of mlx-lm: which kinds there are, which rows they hand to attention, and whether they go back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as caches

from kvdrift.errors import CaptureError, UsageError
from kvdrift.trace.model import Slots
from kvdrift.vocabulary.sites import Site

KINDS = ("default", "batch", "quantized", "rotating", "chunked")
_WINDOW = 8  # slots of a rotating cache, and of a chunk: shorter than a usual prompt
_GROUP, _BITS = 32, 8
_OF_MATRICES = 4  # axes of a state: row, head and those of a matrix


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


def windows_of(model: Any, layers: Sequence[Any]) -> tuple[int | None, ...]:
    """Return how many tokens each layer with a cache of its own sees by the caches that the model makes; None for all.

    Layers behind those read the cache of a lower one.
    """
    own = caches.make_prompt_cache(model)
    if len(own) > len(layers):
        return ()
    return tuple(int(each.max_size) if type(each) is caches.RotatingKVCache else None for each in own)


def why_no_rewind(cache: list[Any]) -> str | None:
    """Say why tokens cannot be dropped from these caches, None if they can."""
    for layer, each in ((layer, inner) for layer, own in enumerate(cache) for inner in flat([own])):
        name = type(each).__name__
        if hasattr(each, "max_size"):
            return f"layer {layer} has a {name}, a ring whose overwritten rows cannot come back"
        if not each.is_trimmable():
            return f"layer {layer} has a {name}, which cannot be trimmed"
    return None


def flat(made: Sequence[Any]) -> list[Any]:
    """Return the caches with those inside of lists of caches in their place."""
    return [inner for each in made for inner in (flat(each.caches) if isinstance(each, caches.CacheList) else [each])]


def rows_held(cache: Any) -> tuple[Any, Any] | None:
    """Return the keys and values [row, head, slot, dim] that the plain cache of a layer holds, None if it has several
    caches, or one of another kind."""
    held = flat([cache])
    if len(held) != 1 or type(held[0]) not in (caches.KVCache, caches.BatchKVCache) or held[0].keys is None:
        return None
    n_held = int(getattr(held[0], "_idx", held[0].offset))
    return held[0].keys[..., :n_held, :], held[0].values[..., :n_held, :]


def states_of(cache: Any, row: int) -> Iterator[tuple[Site, Any]]:
    """Yield the recurrent states of one row of a layer's cache, flat: what a convolution keeps of its last inputs, and
    the state itself.

    A cache of arrays does not say which is which. A state has a matrix a head, and where none has, it is the last of
    several arrays, as all models of mlx-lm keep them.
    """
    held = [getattr(each, "cache", None) for each in flat([cache])]  # of whatever class: releases name it otherwise
    arrays = [a for found in held if isinstance(found, list) for a in found if isinstance(a, mx.array) and a.size]
    matrices = [array.ndim >= _OF_MATRICES for array in arrays]
    if not any(matrices) and len(arrays) > 1:
        matrices[-1] = True
    for site, wanted in ((Site.CONV_STATE, False), (Site.SSM_STATE, True)):
        chosen = [array[row].reshape(-1) for array, matrix in zip(arrays, matrices, strict=True) if matrix == wanted]
        if chosen:
            yield site, chosen[0] if len(chosen) == 1 else mx.concatenate(chosen)


def trim(cache: list[Any], n_tokens: int) -> None:
    """Drop the last tokens from all layers.

    Raises:
        CaptureError: the caches say that they dropped another number.
    """
    if n_tokens and (trimmed := caches.trim_prompt_cache(cache, n_tokens)) != n_tokens:
        raise CaptureError(f"the cache dropped {trimmed} tokens, and {n_tokens} were to be dropped")


def batched(model: Any, kind: str, pads: Sequence[int]) -> list[Any]:
    """Return the empty caches of all layers for rows with padding on the left: those that mlx-lm's own generation puts
    in the place of a model's.

    Raises:
        ValueError: mlx-lm has no batch of a kind of cache.
    """
    return [_batch_of(each, list(pads)) for each in new_cache(model, "default" if kind == "batch" else kind)]


def _batch_of(cache: Any, pads: list[int]) -> Any:
    """The rule of `_make_cache` in mlx_lm.generate, which 0.32.2 no longer has."""
    if type(cache) is caches.KVCache:
        return caches.BatchKVCache(pads)
    if isinstance(cache, caches.RotatingKVCache) and not cache.keep:
        return caches.BatchRotatingKVCache(cache.max_size, pads)
    if isinstance(cache, caches.ArraysCache):
        cache.left_padding = mx.array(pads)
        return cache
    if isinstance(cache, caches.CacheList):
        return caches.CacheList(*(_batch_of(each, pads) for each in cache.caches))
    raise ValueError(f"mlx-lm has no batch of {type(cache).__name__}")


def slots_of(cache: Any, n_keys: int, q_len: int, length: int) -> Slots:
    """Return the logical position of each key that attention is handed, when `length` tokens are in the cache.

    A ring keeps its first `keep` rows, and is overwritten behind them one token at a time; a call of several tokens
    puts it in order.
    """
    # Of several caches of a layer, the one that holds keys is meant.
    cache = next((each for each in flat([cache]) if hasattr(each, "update_and_fetch")), cache)
    keep = int(getattr(cache, "keep", 0) or 0)
    newest = np.arange(length - n_keys, length, dtype=np.int64)
    if n_keys >= length or not hasattr(cache, "max_size"):
        return newest
    newest[:keep] = np.arange(keep)
    if q_len > 1:
        return newest
    behind = int(cache._idx)
    return np.concatenate([newest[:keep], np.roll(newest[keep:], behind - keep)])


__all__ = [
    "KINDS",
    "batched",
    "flat",
    "new_cache",
    "rows_held",
    "slots_of",
    "states_of",
    "trim",
    "why_no_rewind",
    "windows_of",
]
