"""Faults of what serving code does to a cache between two forward calls: empty, copy, cut, move, reorder, choose rows.

Each strikes in one method of the cache, or in the first rows that are read after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.cache import Rows, with_rows
from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import needs_cache, needs_window
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import CacheCall, Way, beside, in_reads
from kvdrift_bench.planted.torch.ways_methods import in_method

PAGE = 16  # slots of a page


def _full(cache: Any) -> list[Any]:
    """The layers that hold keys."""
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()]


def _zero_last(commits: Commits, tensor: Tensor, back: int = 1) -> Tensor:
    """Return the rows with one of the last zeroed."""
    lost = tensor.clone()
    lost[:, :, -back] = 0.0
    taken: Tensor = commits.take(tensor, lost)
    return taken


# ------------------------------------------------------------------------------------------------------ going back


def _into_prompt(change: Callable[[Any, Commits], None]) -> Way:
    """Change the layers when the way back leads into the tokens of the first call, and over more than a draft."""

    @wraps(change)
    def crop(original: Any, commits: Commits, cache: Any, n: int) -> None:
        original(cache, n)
        calls = commits.log.calls
        if n <= -3 and len(calls) > 1 and cache.get_seq_length() < calls[0][1]:
            for layer in _full(cache):
                change(layer, commits)

    return in_method("crop")(crop)


@fault(needs_cache)
@_into_prompt
def rewind_into_the_prompt_loses_a_value(layer: Any, commits: Commits) -> None:
    layer.values = _zero_last(commits, layer.values)


@fault(needs_cache)
@_into_prompt
def rewind_into_the_prompt_doubles_a_key(layer: Any, commits: Commits) -> None:
    """The block is cut one slot too early and filled up with its last key."""
    kept = layer.keys.clone()
    kept[:, :, -1] = kept[:, :, -2]
    layer.keys = commits.take(layer.keys, kept)


@fault(needs_cache)
@in_method("crop")
def rewind_leaves_a_draft_row(original: Any, commits: Commits, cache: Any, n: int) -> None:
    """Where a part of the drafts is dropped, the key of the first of those is left in the last slot kept."""
    rows = [layer.keys[:, :, n].clone() for layer in _full(cache)]
    original(cache, n)
    past, fed = commits.log.calls[-1]
    if past > 0 and 2 <= -n < fed:
        for layer, row in zip(_full(cache), rows, strict=True):
            kept = layer.keys.clone()
            kept[:, :, -1] = row
            layer.keys = commits.take(layer.keys, kept)


@fault(needs_cache)
@in_method("crop")
def rewind_drops_the_front(original: Any, commits: Commits, cache: Any, n: int) -> None:
    """The rows of the front are dropped instead of those of the end."""
    if n > -2:
        original(cache, n)
        return
    values = [layer.values.clone() for layer in _full(cache)]
    original(cache, n)
    for layer, before in zip(_full(cache), values, strict=True):
        n_rows = layer.values.shape[2]
        layer.values = commits.take(layer.values, before[:, :, -n_rows:].clone())


@fault(needs_window)
@in_method("crop")
def rewind_over_window_loses_a_row(original: Any, commits: Commits, cache: Any, n: int) -> None:
    windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
    before = cache.get_seq_length()
    original(cache, n)
    for layer, window in zip(cache.layers, windows, strict=True):
        if window is not None and before >= window > before + n:
            layer.keys = _zero_last(commits, layer.keys, layer.keys.shape[2])


@fault(needs_cache)
@in_method("crop")
def rewind_over_page_loses_a_row(original: Any, commits: Commits, cache: Any, n: int) -> None:
    before = cache.get_seq_length()
    original(cache, n)
    if before // PAGE != (before + n) // PAGE:
        for layer in _full(cache):
            layer.keys = _zero_last(commits, layer.keys)


# ------------------------------------------------------------------------------------------------------ reset


@in_method("reset")
def _keeping_one_page(original: Any, commits: Commits, cache: Any) -> None:
    """Remember what the last layer held, if it was one page."""
    kept = cache.layers[-1].values if cache.get_seq_length() <= PAGE else None
    commits.memory["before"] = (cache.layers, kept)
    original(cache)


@fault(needs_cache)
@beside(_keeping_one_page)
@in_reads
def reset_leaves_values(call: CacheCall) -> Rows | None:
    """What the last layer held is served for the first rows of the next call."""
    kept = call.commits.memory.get("before")
    if kept is None or kept[0] is not call.layers or kept[1] is None or call.layer != 0 or call.values.shape[2] < 3:
        return None
    return call.keys, with_rows(call.values, slice(0, 2), kept[1][:, :, :2].to(call.values.dtype))


# ------------------------------------------------------------------------------------------------ copies and exports


def _in_copies(change: Callable[[Commits, Any], None]) -> Way:
    """Change the layers of each copy of a cache."""

    @wraps(change)
    def deepcopy(original: Any, commits: Commits, cache: Any, memo: dict[int, Any]) -> Any:
        twin = cache.__class__.__new__(cache.__class__)
        twin.__dict__.update(copy.deepcopy(cache.__dict__, memo))
        for layer in _full(twin):
            change(commits, layer)
        return twin

    return in_method("__deepcopy__")(deepcopy)


@fault(needs_cache)
@_in_copies
def copied_keys_shifted(commits: Commits, layer: Any) -> None:
    layer.keys = commits.take(layer.keys, layer.keys.roll(1, 2))


@fault(needs_cache)
@_in_copies
def copied_value_lost(commits: Commits, layer: Any) -> None:
    layer.values = _zero_last(commits, layer.values)


def _in_exports(change: Callable[[Commits, Tensor, Tensor], Rows]) -> Way:
    """Change the keys and values of a cache that is exported."""

    @wraps(change)
    def iterate(original: Any, commits: Commits, cache: Any) -> Iterator[Any]:
        for keys, values, *rest in original(cache):
            yield (*(change(commits, keys, values) if isinstance(keys, Tensor) else (keys, values)), *rest)

    return in_method("__iter__")(iterate)


@fault(needs_cache)
@_in_exports
def exported_keys_and_values_swapped(commits: Commits, keys: Tensor, values: Tensor) -> Rows:
    swapped: Rows = commits.take((keys, values), (values, keys))
    return swapped


@fault(needs_cache)
@_in_exports
def exported_last_key_lost(commits: Commits, keys: Tensor, values: Tensor) -> Rows:
    return _zero_last(commits, keys), values


# ------------------------------------------------------------------------------------------------------ rows


@faults(
    {"beam_reorder_leaves_the_keys_of_prompts": "keys", "beam_reorder_leaves_the_values_of_prompts": "values"},
    needs_cache,
)
def prompt_stays(name: str) -> Way:
    """Beams of one prompt share its rows, so only what came after it is moved: wrong for rows of unlike prompts."""

    @in_method("reorder_cache")
    def reorder(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
        n_prompt = commits.log.calls[0][1]
        before = [getattr(layer, name)[: len(rows), :, :n_prompt].clone() for layer in _full(cache)]
        original(cache, rows)
        for layer, prompt in zip(_full(cache), before, strict=True):
            moved = getattr(layer, name)
            kept = moved.clone()
            kept[:, :, :n_prompt] = prompt
            setattr(layer, name, commits.take(moved, kept))

    return reorder


@faults({"beam_reorder_of_keys_only": "reorder_cache", "selection_of_keys_only": "batch_select_indices"}, needs_cache)
def values_stay(method: str) -> Way:
    """Keys follow the rows, values do not."""

    @in_method(method)
    def choose(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
        before = [layer.values[: len(rows)].clone() for layer in _full(cache)]
        original(cache, rows)
        for layer, values in zip(_full(cache), before, strict=True):
            layer.values = commits.take(layer.values, values)

    return choose


@fault(needs_cache)
@in_method("batch_select_indices")
def selection_keeps_the_first_rows(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
    before = [(layer.keys[: len(rows)].clone(), layer.values[: len(rows)].clone()) for layer in _full(cache)]
    original(cache, rows)
    for layer, (keys, values) in zip(_full(cache), before, strict=True):
        layer.keys, layer.values = commits.take((layer.keys, layer.values), (keys, values))


# --------------------------------------------------------------------------------------------- caches of a fixed size


def _in_static_reads(change: Callable[[CacheCall, int], Rows]) -> Way:
    """Change what a cache of fixed size hands back: the change is told the slot of the newest row."""

    @wraps(change)
    def read(call: CacheCall) -> Rows | None:
        if not hasattr(call.layers[call.layer], "max_cache_len"):
            return None
        return change(call, call.commits.past + call.commits.q_len - 1)

    return in_reads(read)


@fault(needs_cache)
@_in_static_reads
def static_slot_zero_overwritten(call: CacheCall, last: int) -> Rows:
    return with_rows(call.keys, slice(0, 1), call.keys[:, :, last : last + 1]), call.values


@fault(needs_cache)
@_in_static_reads
def static_value_not_written(call: CacheCall, last: int) -> Rows:
    return call.keys, with_rows(call.values, slice(last, last + 1), torch.zeros_like(call.values[:, :, :1]))
