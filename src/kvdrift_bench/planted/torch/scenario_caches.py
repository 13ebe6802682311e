"""Faults of what serving code does to a cache between two forward calls: empty, copy, cut, move, reorder, choose rows.

Each strikes in one method of the cache, or in the first rows that are read after it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.cache import with_rows
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.parts import needs_window
from kvdrift_bench.planted.torch.scenario_fault import scenario_fault
from kvdrift_bench.planted.torch.ways import CacheCall, Way, in_reads

PAGE = 16  # slots of a page


def cache_handling_faults() -> tuple[Fault, ...]:
    """Return the faults of cache handling that need a scenario."""
    return (*_rewinds(), *_resets(), *_copies(), *_rows(), *_kinds())


def in_method(name: str, instead: Callable[..., Any]) -> Way:
    """Return the way that replaces a method of a dynamic cache by `instead(original, commits, cache, ...)`."""

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        from transformers import DynamicCache

        own = DynamicCache.__dict__.get(name)
        original = getattr(DynamicCache, name, None)

        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return instead(original, commits, self, *args, **kwargs)

        setattr(DynamicCache, name, method)
        try:
            yield
        finally:
            if own is None:
                delattr(DynamicCache, name)
            else:
                setattr(DynamicCache, name, own)

    return way


def _full(cache: Any) -> list[Any]:
    """The layers that hold keys."""
    return [layer for layer in cache.layers if isinstance(getattr(layer, "keys", None), Tensor) and layer.keys.numel()]


def _zero_last(commits: Commits, tensor: Tensor, back: int = 1) -> Tensor:
    """Return the rows with one of the last zeroed."""
    lost = tensor.clone()
    lost[:, :, -back] = 0.0
    taken: Tensor = commits.take(tensor, lost)
    return taken


def _rewinds() -> tuple[Fault, ...]:
    def stale_draft(original: Any, commits: Commits, cache: Any, n: int) -> None:
        """Where a part of the drafts is dropped, the key of the first of those is left in the last slot kept."""
        rows = [layer.keys[:, :, n].clone() for layer in _full(cache)]
        original(cache, n)
        past, fed = commits.log.calls[-1]
        if past > 0 and 2 <= -n < fed:
            for layer, row in zip(_full(cache), rows, strict=True):
                kept = layer.keys.clone()
                kept[:, :, -1] = row
                layer.keys = commits.take(layer.keys, kept)

    def shifted(original: Any, commits: Commits, cache: Any, n: int) -> None:
        """The rows of the front are dropped instead of those of the end."""
        if n > -2:
            original(cache, n)
            return
        values = [layer.values.clone() for layer in _full(cache)]
        original(cache, n)
        for layer, before in zip(_full(cache), values, strict=True):
            n_rows = layer.values.shape[2]
            layer.values = commits.take(layer.values, before[:, :, -n_rows:].clone())

    def over_window(original: Any, commits: Commits, cache: Any, n: int) -> None:
        windows = [getattr(layer, "sliding_window", None) for layer in cache.layers]
        before = cache.get_seq_length()
        original(cache, n)
        for layer, window in zip(cache.layers, windows, strict=True):
            if window is not None and before >= window > before + n:
                layer.keys = _zero_last(commits, layer.keys, layer.keys.shape[2])

    def over_page(original: Any, commits: Commits, cache: Any, n: int) -> None:
        before = cache.get_seq_length()
        original(cache, n)
        if before // PAGE != (before + n) // PAGE:
            for layer in _full(cache):
                layer.keys = _zero_last(commits, layer.keys)

    def into_prompt(change: Callable[[Any, Commits], None]) -> Way:
        """Change the layers when the way back leads into the tokens of the first call, and over more than a draft."""

        def crop(original: Any, commits: Commits, cache: Any, n: int) -> None:
            original(cache, n)
            calls = commits.log.calls
            if n <= -3 and len(calls) > 1 and cache.get_seq_length() < calls[0][1]:
                for layer in _full(cache):
                    change(layer, commits)

        return in_method("crop", crop)

    def last_value_lost(layer: Any, commits: Commits) -> None:
        layer.values = _zero_last(commits, layer.values)

    def last_key_doubled(layer: Any, commits: Commits) -> None:
        """The block is cut one slot too early and filled up with its last key."""
        kept = layer.keys.clone()
        kept[:, :, -1] = kept[:, :, -2]
        layer.keys = commits.take(layer.keys, kept)

    return (
        scenario_fault(
            "rewind_into_the_prompt_loses_a_value",
            "M12",
            "paiml/aprender#2014",
            "Going back behind the end of the prompt loses the value of the last token kept.",
            "rewind",
            "slot_zeroed",
            into_prompt(last_value_lost),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "rewind_into_the_prompt_doubles_a_key",
            "M12",
            "lablup/mlxcel#994",
            "Going back behind the end of the prompt cuts one slot too early, and the last key kept is there twice.",
            "rewind",
            "slot_aliased",
            into_prompt(last_key_doubled),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "rewind_leaves_a_draft_row",
            "M12",
            "xLLM-AI/xllm#1944",
            "When some of the drafts are dropped, the key of one stays in the place of the last token kept.",
            "rewind",
            "rewind_residue",
            in_method("crop", stale_draft),
        ),
        scenario_fault(
            "rewind_drops_the_front",
            "M12",
            "lablup/mlxcel#994",
            "Going back by two or more drops values from the front of the cache instead of its end.",
            "rewind",
            "rewind_overshoot",
            in_method("crop", shifted),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "rewind_over_window_loses_a_row",
            "M09",
            "Blaizzy/mlx-vlm#1715",
            "Going back from behind the window to before it does not bring the oldest key back.",
            "rewind_edge",
            "rewind_overshoot",
            in_method("crop", over_window),
            applies=needs_window,
        ),
        scenario_fault(
            "rewind_over_page_loses_a_row",
            "M11",
            "sgl-project/sglang#22819",
            "Going back over the edge of a page of 16 slots frees a key too many.",
            "rewind_edge",
            "rewind_overshoot",
            in_method("crop", over_page),
        ),
    )


def _resets() -> tuple[Fault, ...]:
    def stale_values(original: Any, commits: Commits, cache: Any) -> None:
        """What the last layer held is served for the first rows of the next call, if it was one page."""
        kept = cache.layers[-1].values if cache.get_seq_length() <= PAGE else None
        commits.memory["before"] = (cache.layers, kept)
        original(cache)

    def served(call: CacheCall) -> tuple[Tensor, Tensor] | None:
        kept = call.commits.memory.get("before")
        if kept is None or kept[0] is not call.layers or kept[1] is None or call.layer != 0 or call.values.shape[2] < 3:
            return None
        return call.keys, with_rows(call.values, slice(0, 2), kept[1][:, :, :2].to(call.values.dtype))

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        with in_method("reset", stale_values)(model, commits), in_reads(served)(model, commits):
            yield

    return (
        scenario_fault(
            "reset_leaves_values",
            "M11",
            "turboderp/exllama#182",
            "Two values of a call before that filled one page are still read after the cache was reset.",
            "second_call",
            "prefix_stale",
            way,
            (Site.V_CACHE,),
        ),
    )


def _copies() -> tuple[Fault, ...]:
    def copied(change: Callable[[Commits, Any], None]) -> Way:
        def deepcopy(original: Any, commits: Commits, cache: Any, memo: dict[int, Any]) -> Any:
            twin = cache.__class__.__new__(cache.__class__)
            twin.__dict__.update(copy.deepcopy(cache.__dict__, memo))
            for layer in _full(twin):
                change(commits, layer)
            return twin

        return in_method("__deepcopy__", deepcopy)

    def shifted(commits: Commits, layer: Any) -> None:
        layer.keys = commits.take(layer.keys, layer.keys.roll(1, 2))

    def no_last_value(commits: Commits, layer: Any) -> None:
        layer.values = _zero_last(commits, layer.values)

    def exported(change: Callable[[Commits, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Way:
        def iterate(original: Any, commits: Commits, cache: Any) -> Iterator[Any]:
            for keys, values, *rest in original(cache):
                yield (*(change(commits, keys, values) if isinstance(keys, Tensor) else (keys, values)), *rest)

        return in_method("__iter__", iterate)

    return (
        scenario_fault(
            "copied_keys_shifted",
            "M09",
            "Blaizzy/mlx-vlm#1715",
            "The keys of a copied prefix lie one slot behind their place.",
            "prefix_reuse",
            "slot_shifted",
            copied(shifted),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "copied_value_lost",
            "M11",
            "sgl-project/sglang#22819",
            "The last value of a copied prefix is zero.",
            "prefix_reuse",
            "slot_zeroed",
            copied(no_last_value),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "exported_keys_and_values_swapped",
            "M14",
            "sgl-project/sglang#23020",
            "Keys and values change places when the cache is exported.",
            "export_import",
            "k_v_swapped",
            exported(lambda commits, keys, values: commits.take((keys, values), (values, keys))),
        ),
        scenario_fault(
            "exported_last_key_lost",
            "M14",
            "ROCm/ATOM#2132",
            "The last key is zero in the exported cache.",
            "export_import",
            "slot_zeroed",
            exported(lambda commits, keys, values: (_zero_last(commits, keys), values)),
            (Site.K_CACHE,),
        ),
    )


def _rows() -> tuple[Fault, ...]:
    def values_stay(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
        """Keys follow the rows, values do not."""
        before = [layer.values[: len(rows)].clone() for layer in _full(cache)]
        original(cache, rows)
        for layer, values in zip(_full(cache), before, strict=True):
            layer.values = commits.take(layer.values, values)

    def first_rows(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
        before = [(layer.keys[: len(rows)].clone(), layer.values[: len(rows)].clone()) for layer in _full(cache)]
        original(cache, rows)
        for layer, (keys, values) in zip(_full(cache), before, strict=True):
            layer.keys, layer.values = commits.take((layer.keys, layer.values), (keys, values))

    def prompt_stays(name: str) -> Way:
        """Beams of one prompt share its rows, so only what came after it is moved: wrong for rows of unlike prompts."""

        def reorder(original: Any, commits: Commits, cache: Any, rows: Tensor) -> None:
            n_prompt = commits.log.calls[0][1]
            before = [getattr(layer, name)[: len(rows), :, :n_prompt].clone() for layer in _full(cache)]
            original(cache, rows)
            for layer, prompt in zip(_full(cache), before, strict=True):
                moved = getattr(layer, name)
                kept = moved.clone()
                kept[:, :, :n_prompt] = prompt
                setattr(layer, name, commits.take(moved, kept))

        return in_method("reorder_cache", reorder)

    return (
        scenario_fault(
            "beam_reorder_leaves_the_keys_of_prompts",
            "M23",
            "huggingface/transformers#46612",
            "When rows change places, the keys of their prompts stay where they were.",
            "beams",
            "batch_row_wrong",
            prompt_stays("keys"),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "beam_reorder_leaves_the_values_of_prompts",
            "M23",
            "huggingface/transformers#46612",
            "When rows change places, the values of their prompts stay where they were.",
            "beams",
            "batch_row_wrong",
            prompt_stays("values"),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "beam_reorder_of_keys_only",
            "M23",
            "huggingface/transformers#46612",
            "Keys are put into the order of the surviving beams, values are not.",
            "beams",
            "batch_row_wrong",
            in_method("reorder_cache", values_stay),
            (Site.V_CACHE,),
        ),
        scenario_fault(
            "selection_keeps_the_first_rows",
            "M23",
            "PaddlePaddle/PaddleNLP#6672",
            "When a row ends, the cache keeps the first rows instead of those that go on.",
            "select_rows",
            "batch_row_wrong",
            in_method("batch_select_indices", first_rows),
        ),
        scenario_fault(
            "selection_of_keys_only",
            "M23",
            "PaddlePaddle/PaddleNLP#6672",
            "When a row ends, keys are selected and values are not.",
            "select_rows",
            "batch_row_wrong",
            in_method("batch_select_indices", values_stay),
            (Site.V_CACHE,),
        ),
    )


def _kinds() -> tuple[Fault, ...]:
    def static(change: Callable[[CacheCall, int], tuple[Tensor, Tensor]]) -> Way:
        def read(call: CacheCall) -> tuple[Tensor, Tensor] | None:
            if not hasattr(call.layers[call.layer], "max_cache_len"):
                return None
            return change(call, call.commits.past + call.commits.q_len - 1)

        return in_reads(read)

    def first_overwritten(call: CacheCall, last: int) -> tuple[Tensor, Tensor]:
        return with_rows(call.keys, slice(0, 1), call.keys[:, :, last : last + 1]), call.values

    def newest_not_written(call: CacheCall, last: int) -> tuple[Tensor, Tensor]:
        return call.keys, with_rows(call.values, slice(last, last + 1), torch.zeros_like(call.values[:, :, :1]))

    return (
        scenario_fault(
            "static_slot_zero_overwritten",
            "M11",
            "tenstorrent/tt-metal#56324",
            "A cache of fixed size writes each new key to slot 0 as well.",
            "static_cache",
            "slot_aliased",
            static(first_overwritten),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "static_value_not_written",
            "M14",
            "huggingface/transformers#42688",
            "A cache of fixed size is read before the new value is in it.",
            "static_cache",
            "slot_zeroed",
            static(newest_not_written),
            (Site.V_CACHE,),
        ),
    )
