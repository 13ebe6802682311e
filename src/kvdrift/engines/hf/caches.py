"""The caches of transformers behind one face: length, rewind, where each row belongs, and who writes to them."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from kvdrift.engines.hf.quantised import HONEST, QUANTISED_KINDS, open_honest, open_quantised
from kvdrift.errors import CaptureError, UsageError
from kvdrift.vocabulary.sites import Site

CACHE_KINDS = ("dynamic", "static")
# What a cache of a caller's own must have.
_NEEDED = ("update", "get_seq_length")
# What a layer may hold beside its rows.
_SIMPLE = (bool, int, float, str, type(None), torch.dtype, torch.device)
# Kinds that scenarios open beside the one that is audited.
OTHER_KINDS = (*CACHE_KINDS, "offloaded", *QUANTISED_KINDS)


class OwnCache:
    """A kind of cache of the caller's own: `make` returns an empty one for each sequence.

    A class counts as such a function; one that needs the configuration of the model is given it as `config`.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self._make = make
        self._name = getattr(make, "__name__", type(make).__name__)
        self._last: Any = None  # kept, so that a new object cannot have its place in memory

    def __str__(self) -> str:
        return self._name

    def open(self, config: Any) -> Any:
        """Return an empty cache.

        Raises:
            UsageError: the function failed, or returned what is not a cache, not empty, or not a new one.
        """
        try:
            cache = self._called(config)
        except Exception as error:
            raise UsageError(
                f"cache= ({self._name}) failed: {type(error).__name__}: {error}; it is called without arguments for "
                "each sequence, and must return an empty cache"
            ) from error
        self._name = type(cache).__name__
        lacking = [name for name in _NEEDED if not callable(getattr(cache, name, None))]
        if lacking:
            raise UsageError(
                f"cache= returned a {self._name}, which has no {' and no '.join(lacking)}; a cache of transformers has "
                "update(keys, values, layer), which returns all keys and values, and get_seq_length()"
            )
        if cache is self._last:
            raise UsageError(
                f"cache= returned the same {self._name} twice; it must make a new one each time it is called "
                f"(cache=lambda: {self._name}(...))"
            )
        self._last = cache
        if (held := int(cache.get_seq_length())) != 0:
            raise UsageError(f"cache= returned a {self._name} that already holds {held} tokens; it must be empty")
        return cache

    def _called(self, config: Any) -> Any:
        if isinstance(self._make, type) and "config" in inspect.signature(self._make).parameters:
            return self._make(config=config)
        return self._make()


CacheKind = str | OwnCache


def cache_kind(given: Any) -> CacheKind:
    """Return the kind of cache that a caller names, or makes by a function of their own.

    Raises:
        UsageError: it is neither; a cache object is one sequence's, and an audit needs many.
    """
    if isinstance(given, str) and given in CACHE_KINDS:
        return given
    if isinstance(given, type) or (callable(given) and not hasattr(given, "update")):
        return OwnCache(given)
    if hasattr(given, "update"):
        name = type(given).__name__
        raise UsageError(
            f"cache= is a {name} object, and each sequence needs one of its own; pass a function that makes them, "
            f"cache=lambda: {name}(...)"
        )
    raise UsageError(
        f"unknown cache kind {given!r}; use --cache with one of {', '.join(CACHE_KINDS)}, or pass cache=lambda: "
        "MyCache() from Python"
    )


class CacheWatcher(Protocol):
    """Hears of every cache update; the recorder and the survey are watchers."""

    def cache_updated(self, layer: int, keys: Tensor, values: Tensor, all_keys: Tensor, all_values: Tensor) -> None: ...


class CacheAdapter:
    """One cache object of transformers and the number of tokens in it."""

    def __init__(self, cache: Any, kinds: Sequence[str] = ()) -> None:
        self.object = cache
        self.length = 0
        self._kinds = tuple(kinds)  # how each layer attends: a layer without rows of its own reads those of its kind
        self._updates = 0
        self._refusal: str | None = None

    @property
    def _layers(self) -> Sequence[Any]:
        """The layers of a cache that has them; one of a caller's own may keep its rows as it likes."""
        return getattr(self.object, "layers", None) or ()

    @contextmanager
    def watched(self, watcher: CacheWatcher) -> Iterator[None]:
        """Tell `watcher` of every update while the context is open; the cache's own update does the work."""
        cache = self.object
        original = cache.update

        def update(key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
            keys, values = original(key_states, value_states, layer_idx, *args, **kwargs)
            self._updates += 1
            watcher.cache_updated(layer_idx, key_states, value_states, keys, values)
            return keys, values

        cache.update = update
        try:
            yield
        finally:
            del cache.update

    def advance(self, n_tokens: int) -> None:
        """Count tokens that a forward call has added."""
        self.length += n_tokens

    @property
    def held(self) -> int | None:
        """Slots that the cache itself says it holds, None if it keeps nothing but states, which do not count."""
        if not self._layers:
            return int(self.object.get_seq_length()) if hasattr(self.object, "get_seq_length") else None
        counting = [layer for layer in self._layers if hasattr(layer, "get_seq_length")]
        return max((int(layer.get_seq_length()) for layer in counting), default=None)

    def was_used(self) -> bool:
        """Whether the model put anything into the cache."""
        return self._updates > 0 or any(True for _ in self.states())

    def slot_offsets(self, q_len: int) -> Callable[[int, int], int]:
        """Return, for the next call of `q_len` tokens, the logical position of a layer's first key.

        The cache announces it to the mask; it is asked before the call, since the call moves it.
        """
        offsets: dict[int, int] = {}
        # Layers that share rows have none in a cache: up to transformers 5.22 it ends before them.
        for layer in range(max(len(self._layers), len(self._kinds))):
            sizes = None if layer >= len(self._layers) else getattr(self._layers[layer], "get_mask_sizes", None)
            offsets[layer] = int(sizes(q_len)[1]) if sizes is not None else self._shared_offset(layer, offsets)
        return lambda layer, _n_keys: offsets.get(layer, 0)

    def _shared_offset(self, layer: int, offsets: dict[int, int]) -> int:
        """The offset of the layer whose rows this one shares: the last one below it that attends in the same way."""
        alike = [below for below in offsets if self._kinds[below : below + 1] == self._kinds[layer : layer + 1]]
        own = [below for below in alike if below < len(self._layers) and hasattr(self._layers[below], "get_mask_sizes")]
        return offsets[own[-1]] if own else 0

    def states(self, row: int = 0) -> Iterator[tuple[int, Site, Tensor]]:
        """Yield the recurrent states of one row of the batch, for the layers that have them."""
        for index, layer in enumerate(self._layers):
            for name, site in (("conv_states", Site.CONV_STATE), ("recurrent_states", Site.SSM_STATE)):
                state = getattr(layer, name, None)
                found = list(state.values()) if isinstance(state, dict) else [state]
                if site is Site.CONV_STATE and getattr(layer, "record_past", False):
                    # While it records its past, a layer holds more columns than it reads.
                    found = [_read_part(t, getattr(layer, "conv_kernel_size", None), i) for i, t in enumerate(found)]
                tensors = [t for t in found if isinstance(t, Tensor) and t.numel()]
                if tensors:
                    yield index, site, torch.cat([t[row].flatten() for t in tensors])

    @property
    def why_no_rewind(self) -> str | None:
        """Why positions cannot be dropped from this cache so that nothing of them is left, None if they can."""
        if self._refusal is not None:
            return self._refusal
        kind = type(self.object)
        if not hasattr(self.object, "crop") and not any(hasattr(layer, "max_cache_len") for layer in self._layers):
            return f"{kind.__name__} offers no way back (crop)"
        if _stores_more(kind):
            return f"{kind.__name__} stores rows in its own way, but has no way back (crop) of its own"
        for index, layer in enumerate(self._layers):
            name = type(layer).__name__
            if getattr(layer, "recurrent_states", None) is not None or getattr(layer, "conv_states", None) is not None:
                return f"layer {index} keeps a recurrent state, which cannot go back"
            static = hasattr(layer, "max_cache_len")
            if static and getattr(layer, "is_sliding", False):
                return f"layer {index} is a static sliding window, whose overwritten rows cannot come back"
            if not static and not hasattr(layer, "crop"):
                return f"layer {index} ({name}) offers no way back"
            if not static and _stores_more(type(layer)) and not _holds_rows_alone(layer):
                return f"layer {index} ({name}) stores rows in its own way, but has no way back of its own"
        return None

    def try_back(self) -> str | None:
        """Go back by one token, and return the cache's own words if it refuses."""
        try:
            self.go_back(1)
        except Exception as error:  # noqa: BLE001 - a cache refuses in many ways
            said = next(iter(str(error).splitlines()), type(error).__name__)
            self._refusal = f"{type(self.object).__name__} refuses to go back: {said}"
        return self._refusal

    @property
    def crops(self) -> bool:
        """Whether every layer offers a way back of some kind."""
        return all(hasattr(layer, "crop") for layer in self._layers)

    @property
    def rewinds_once(self) -> bool:
        """Whether a second rewind would lack rows: a sliding layer cuts itself back to its window at the first one."""
        return any(getattr(layer, "is_sliding", False) for layer in self._layers)

    def rewind(self, n_tokens: int) -> None:
        """Drop the last `n_tokens` positions.

        Dynamic layers are cropped by their own method. A static layer has none: its length is set back, as serving
        code does it, and the rows beyond are hidden by the mask until they are overwritten.
        """
        if n_tokens < 0 or n_tokens > self.length:
            raise UsageError(f"cannot rewind {n_tokens} tokens of a sequence of {self.length}")
        if self.why_no_rewind is not None:
            raise CaptureError(f"cannot rewind: {self.why_no_rewind}")
        self.go_back(n_tokens)

    def go_back(self, n_tokens: int) -> None:
        """Drop the last `n_tokens` positions by what the cache offers for it, whatever that leaves behind.

        What it raises is its own word that it cannot go back.
        """
        if n_tokens == 0:
            return
        if any(hasattr(layer, "max_cache_len") for layer in self._layers):
            for layer in self._layers:
                if layer.is_initialized:
                    layer.cumulative_length.sub_(n_tokens)
        else:
            self.object.crop(-n_tokens)
        self.length -= n_tokens

    def reset(self) -> None:
        """Empty the cache by its own method; the object stays."""
        self.object.reset()
        self.length = 0

    def copied(self) -> CacheAdapter:
        """Return a copy that shares no tensor with this one."""
        twin = CacheAdapter(copy.deepcopy(self.object), self._kinds)
        twin.length = self.length
        return twin

    def moved(self, config: Any) -> CacheAdapter:
        """Return a new cache with what this one holds, through the only way in and out that transformers has: the
        (key, value) pairs that iterating over a dynamic cache gives, and that its constructor takes."""
        from transformers import DynamicCache

        twin = CacheAdapter(DynamicCache(ddp_cache_data=list(self.object), config=config), self._kinds)
        twin.length = self.length
        return twin

    def close(self) -> None:
        """Let go of the cached tensors."""
        self.object = None


def _read_part(state: Any, sizes: Any, index: int) -> Any:
    size = sizes.get(index) if isinstance(sizes, dict) else sizes
    return state[..., -size:] if isinstance(state, Tensor) and isinstance(size, int) else state


def _stores_more(kind: type) -> bool:
    """Whether a kind of layer from outside of the module of caches writes what the way back that it inherits does not
    know of. The kinds within go together."""
    from transformers import cache_utils

    writer, cropper = (next((cls for cls in kind.__mro__ if name in vars(cls)), object) for name in ("update", "crop"))
    return writer is not cropper and issubclass(writer, cropper) and writer.__module__ != cache_utils.__name__


def _holds_rows_alone(layer: Any) -> bool:
    """Whether all that a layer holds are keys and values [..., slot, dim], a slot for each token: a way back that cuts
    these is then right, however they were rounded when they were written."""
    held = {name: value for name, value in vars(layer).items() if not isinstance(value, _SIMPLE)}
    if held.keys() != {"keys", "values"} or not all(isinstance(value, Tensor) for value in held.values()):
        return False
    n_slots = layer.get_seq_length()
    return bool(n_slots) and all(value.ndim > 2 and value.shape[-2] == n_slots for value in held.values())


def open_cache(kind: CacheKind, config: Any, max_length: int, *, keep_past: bool = False) -> CacheAdapter:
    """Return an empty cache of `kind` with room for `max_length` tokens."""
    from transformers import DynamicCache, StaticCache

    kinds = getattr(config, "layer_types", None) or ()
    if isinstance(kind, OwnCache):
        own = kind.open(config)
        if keep_past and hasattr(own, "activate_past_recording"):
            own.activate_past_recording()
        return CacheAdapter(own, kinds)
    if kind == "static":
        return CacheAdapter(StaticCache(config=config, max_cache_len=max_length), kinds)
    if kind in QUANTISED_KINDS:
        return CacheAdapter(open_quantised(kind, config), kinds)
    if kind.startswith(HONEST):
        return CacheAdapter(open_honest(kind, config), kinds)
    cache = DynamicCache(config=config, offloading=kind == "offloaded")
    if keep_past:
        # Sliding layers forget rows that have left the window unless they are told that someone may go back.
        cache.activate_past_recording()
    return CacheAdapter(cache, kinds)
