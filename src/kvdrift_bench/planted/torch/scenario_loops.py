"""Faults of a model's own generation loop: they are committed while `generate` runs, and by nothing else.

Each goes through a method of the model that the loop looks up on it, or a function of the loop's module, so that the
same cache and the same forward call stay right outside of `generate`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from kvdrift_bench.planted.torch.model import Commits
from kvdrift_bench.planted.torch.parts import needs_cache, needs_interface, needs_positions, two_thirds_up
from kvdrift_bench.planted.torch.registry import fault, faults
from kvdrift_bench.planted.torch.ways import Way, beside, cached_tokens
from kvdrift_bench.planted.torch.ways_methods import in_class_of_model, in_loop, in_method

# ------------------------------------------------------------------------------------------------------ inputs


def _in_prepared(change: Callable[[Commits, dict[str, Any]], None]) -> Way:
    """Change the arguments of a forward call on a filled cache."""

    @wraps(change)
    def prepare(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> dict[str, Any]:
        inputs: dict[str, Any] = original(*args, **kwargs)
        if cached_tokens(inputs.get("past_key_values")) > 0:
            change(commits, inputs)
        else:
            commits.memory["before"] = commits.memory.get("now", 0)
            commits.memory["now"] = int(inputs["input_ids"].shape[1])
        return inputs

    return in_loop("prepare_inputs_for_generation")(prepare)


@fault(needs_positions)
@_in_prepared
def generate_drops_positions(commits: Commits, inputs: dict[str, Any]) -> None:
    if inputs.get("position_ids") is not None:
        commits.take(True, inputs.pop("position_ids") is None)


@fault(needs_interface)
@_in_prepared
def generate_forgets_padding(commits: Commits, inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if mask is not None:
        inputs["attention_mask"] = commits.take(mask, torch.ones_like(mask))


@fault(needs_interface)
@_in_prepared
def generate_drops_mask_column(commits: Commits, inputs: dict[str, Any]) -> None:
    mask = inputs.get("attention_mask")
    if mask is not None:
        inputs["attention_mask"] = commits.take(mask, mask[:, :-1])


@fault(needs_positions)
@_in_prepared
def generate_keeps_delta(commits: Commits, inputs: dict[str, Any]) -> None:
    positions, delta = inputs.get("position_ids"), commits.memory.get("before", 0)
    if positions is not None and delta:
        inputs["position_ids"] = commits.take(positions, positions + delta)


# ------------------------------------------------------------------------------------------------------ beams


@fault(needs_cache, first=two_thirds_up)
@in_loop("_reorder_cache")
def generate_reorders_all_but_one_layer(original: Any, commits: Commits, cache: Any, order: Tensor) -> Any:
    """The layer two thirds up keeps the order that it had."""
    layer = cache.layers[(2 * len(cache.layers)) // 3]
    before = layer.keys.clone(), layer.values.clone()
    cache.reorder_cache(order)
    layer.keys, layer.values = commits.take((layer.keys, layer.values), before)
    return cache


@fault(needs_cache)
@in_loop("_reorder_cache")
def generate_reorders_one_step_late(original: Any, commits: Commits, cache: Any, order: Tensor) -> Any:
    last = commits.memory.get("order")
    commits.memory["order"] = order.clone()
    if last is None or len(last) != len(order) or cached_tokens(cache) <= commits.memory.get("length", 0):
        last = order  # the first step of a call
    commits.memory["length"] = cached_tokens(cache)
    cache.reorder_cache(commits.take(order, last))
    return cache


# ------------------------------------------------------------------------------------------------------ drafts


@in_class_of_model("_assisted_decoding")
def _noting_assistance(original: Any, commits: Commits, model: Any, *args: Any, **kwargs: Any) -> Any:
    commits.memory["assisting"] = True
    try:
        return original(model, *args, **kwargs)
    finally:
        commits.memory["assisting"] = False


@fault(needs_cache)
@beside(_noting_assistance)
@in_method("crop")
def generate_keeps_a_rejected_draft(original: Any, commits: Commits, cache: Any, n: int) -> None:
    less = n + 1 if commits.memory.get("assisting") and n <= -2 else n
    original(cache, commits.take(n, less))


@fault(needs_positions)
@contextmanager
def generate_shifts_drafts(model: Any, commits: Commits) -> Iterator[None]:
    """On a filled cache, the positions of drafts begin one too high; the function is that of the loop's module."""
    from transformers.generation import utils

    name = "_prepare_position_ids"
    original = getattr(utils, name)

    def shifted(kwargs: dict[str, Any], length: int, is_encoder_decoder: bool) -> dict[str, Any]:
        n_known, is_filled = kwargs["position_ids"].shape[-1], cached_tokens(kwargs["past_key_values"]) > 0
        found: dict[str, Any] = original(kwargs, length, is_encoder_decoder)
        ids = found["position_ids"].clone()
        ids[..., n_known:] += int(is_filled)
        found["position_ids"] = commits.take(found["position_ids"], ids)
        return found

    setattr(utils, name, shifted)
    try:
        yield
    finally:
        setattr(utils, name, original)


@fault(needs_cache)
@in_loop("_get_candidate_generator")
def draft_model_writes_to_the_first_layer(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> Any:
    """The only layer of the draft model is number 0, and so is the first one of the model: both write there."""
    source, cache = original(*args, **kwargs), kwargs["model_kwargs"]["past_key_values"]
    own = source.get_candidates

    def get_candidates(input_ids: Tensor) -> Any:
        proposed = own(input_ids)
        n_rows, drafts = cached_tokens(cache), source.assistant_kwargs.get("past_key_values")
        if n_rows and drafts is not None:
            keys, row = cache.layers[0].keys, drafts.layers[0].keys[:, :, n_rows - 1 : n_rows]
            if row.shape == keys[:, :, -1:].shape:
                cache.layers[0].keys = commits.take(keys, torch.cat([keys[:, :, :-1], row.to(keys)], dim=2))
        return proposed

    source.get_candidates = get_candidates
    return source


# ------------------------------------------------------------------------------------------------------ choices
# Behind the logits: every tensor is right, and the tokens are not.


@in_loop("generate")
def _noting_the_draft_model(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> Any:
    commits.memory["draft model"] = kwargs.get("assistant_model") is not None
    return original(*args, **kwargs)


@faults({"generate_keeps_forbidden_words": False, "generate_keeps_forbidden_drafts": True}, needs_cache)
def forbidden(with_drafts: bool) -> Way:
    """Forbid a third of the vocabulary, where drafts are verified or where tokens are chosen one by one."""

    def forbid(input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) % 3 == 0, -torch.inf)

    @beside(_noting_the_draft_model)
    @in_loop("_get_logits_processor")
    def processors(original: Any, commits: Commits, generation_config: Any, **kwargs: Any) -> Any:
        found = original(generation_config=generation_config, **kwargs)
        drafts = generation_config.prompt_lookup_num_tokens is not None or commits.memory["draft model"]
        if generation_config.num_beams == 1 and drafts == with_drafts:
            found.insert(0, lambda input_ids, scores: commits.take(scores, forbid(input_ids, scores)))
        return found

    return processors


@fault(needs_cache)
@in_loop("_update_finished_beams")
def generate_returns_the_worst_beam_first(original: Any, commits: Commits, **kwargs: Any) -> Any:
    sequences, *others = original(**kwargs)
    order = list(range(sequences.shape[1]))[::-1]
    return commits.take([], [value[:, order] for value in (sequences, *others)])
