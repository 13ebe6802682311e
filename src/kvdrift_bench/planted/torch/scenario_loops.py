"""Faults of a model's own generation loop: they are committed while `generate` runs, and by nothing else.

Each goes through a method of the model that the loop looks up on it, or a function of the loop's module, so that the
same cache and the same forward call stay right outside of `generate`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import Commits, Fault
from kvdrift_bench.planted.torch.parts import attention_modules, needs_interface, needs_positions
from kvdrift_bench.planted.torch.scenario_caches import in_method
from kvdrift_bench.planted.torch.scenario_fault import CACHE, ROTATED, scenario_fault
from kvdrift_bench.planted.torch.ways import Way, cached_tokens

GREEDY, BEAM, ASSISTED = "generate_greedy", "generate_beam", "generate_assisted"
WRONG_CHOICE = "wrong_choice"

# The method as it is, what the planting remembers, and the arguments of the call.
Instead = Callable[..., Any]


def loop_faults() -> tuple[Fault, ...]:
    """Return the faults of a generation loop."""
    return (*_inputs(), *_beams(), *_drafts(), *_choices())


def in_loop(name: str, instead: Instead) -> Way:
    """Replace a method that the loop looks up on the model by `instead(original, commits, ...)`; one that the model
    does not have is given to it, with None for the original."""

    @contextmanager
    def way(model: nn.Module, commits: Commits) -> Iterator[None]:
        original = getattr(model, name, None)
        before = model.__dict__.get(name)

        def method(*args: Any, **kwargs: Any) -> Any:
            return instead(original, commits, *args, **kwargs)

        model.__dict__[name] = method if original is None else functools.wraps(original)(method)
        try:
            yield
        finally:
            del model.__dict__[name]
            if before is not None:
                model.__dict__[name] = before

    return way


def _two_thirds(model: nn.Module) -> int:
    return (2 * len(attention_modules(model))) // 3


def _inputs() -> tuple[Fault, ...]:
    def prepared(change: Callable[[Commits, dict[str, Any]], None]) -> Way:
        """Change the arguments of a forward call on a filled cache."""

        def prepare(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs: dict[str, Any] = original(*args, **kwargs)
            if cached_tokens(inputs.get("past_key_values")) > 0:
                change(commits, inputs)
            else:
                commits.memory["before"] = commits.memory.get("now", 0)
                commits.memory["now"] = int(inputs["input_ids"].shape[1])
            return inputs

        return in_loop("prepare_inputs_for_generation", prepare)

    def no_positions(commits: Commits, inputs: dict[str, Any]) -> None:
        if inputs.get("position_ids") is not None:
            commits.take(True, inputs.pop("position_ids") is None)

    def no_mask(commits: Commits, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = commits.take(mask, torch.ones_like(mask))

    def last_column_lost(commits: Commits, inputs: dict[str, Any]) -> None:
        mask = inputs.get("attention_mask")
        if mask is not None:
            inputs["attention_mask"] = commits.take(mask, mask[:, :-1])

    def with_delta(commits: Commits, inputs: dict[str, Any]) -> None:
        positions, delta = inputs.get("position_ids"), commits.memory.get("before", 0)
        if positions is not None and delta:
            inputs["position_ids"] = commits.take(positions, positions + delta)

    return (
        scenario_fault(
            "generate_drops_positions",
            "M02",
            "unslothai/unsloth#3795",
            "The inputs of decode steps, as generate prepares them, lack the positions of a padded batch.",
            GREEDY,
            "rope_position_offset",
            prepared(no_positions),
            ROTATED,
            needs_positions,
        ),
        scenario_fault(
            "generate_forgets_padding",
            "M08",
            "TransformerLensOrg/TransformerLens#1005",
            "The mask of decode steps, as generate prepares it, shows the padding.",
            GREEDY,
            "mask_leak",
            prepared(no_mask),
            (Site.ATTN_SCORES, Site.ATTN_PROBS),
            needs_interface,
        ),
        scenario_fault(
            "generate_drops_mask_column",
            "M08",
            "huggingface/transformers#29389",
            "The mask of decode steps, as generate prepares it, lacks its last column.",
            GREEDY,
            "key_lost_last",
            prepared(last_column_lost),
            (Site.ATTN_SCORES, Site.ATTN_PROBS),
            needs_interface,
        ),
        scenario_fault(
            "generate_keeps_delta",
            "M01",
            "huggingface/transformers#43952",
            "The positions of decode steps carry the length of the prompt of the generate call before.",
            GREEDY,
            "rope_position_offset",
            prepared(with_delta),
            ROTATED,
            needs_positions,
        ),
    )


def _beams() -> tuple[Fault, ...]:
    def one_layer_left(original: Any, commits: Commits, cache: Any, order: Tensor) -> Any:
        """The layer two thirds up keeps the order that it had."""
        layer = cache.layers[(2 * len(cache.layers)) // 3]
        before = layer.keys.clone(), layer.values.clone()
        cache.reorder_cache(order)
        layer.keys, layer.values = commits.take((layer.keys, layer.values), before)
        return cache

    def one_step_late(original: Any, commits: Commits, cache: Any, order: Tensor) -> Any:
        last = commits.memory.get("order")
        commits.memory["order"] = order.clone()
        if last is None or len(last) != len(order) or cached_tokens(cache) <= commits.memory.get("length", 0):
            last = order  # the first step of a call
        commits.memory["length"] = cached_tokens(cache)
        cache.reorder_cache(commits.take(order, last))
        return cache

    return (
        scenario_fault(
            "generate_reorders_all_but_one_layer",
            "M23",
            "huggingface/transformers#46612",
            "When beams change places in generate, the cache of one layer stays in the old order.",
            BEAM,
            "batch_row_wrong",
            in_loop("_reorder_cache", one_layer_left),
            CACHE,
            find_layer=_two_thirds,
        ),
        scenario_fault(
            "generate_reorders_one_step_late",
            "M23",
            "bigscience-workshop/petals#571",
            "When beams change places in generate, the cache is put into the order of the step before.",
            BEAM,
            "batch_row_wrong",
            in_loop("_reorder_cache", one_step_late),
            CACHE,
        ),
    )


def _drafts() -> tuple[Fault, ...]:
    def assisting(original: Any, commits: Commits, model: Any, *args: Any, **kwargs: Any) -> Any:
        commits.memory["assisting"] = True
        try:
            return original(model, *args, **kwargs)
        finally:
            commits.memory["assisting"] = False

    def one_too_few(original: Any, commits: Commits, cache: Any, n: int) -> None:
        less = n + 1 if commits.memory.get("assisting") and n <= -2 else n
        original(cache, commits.take(n, less))

    @contextmanager
    def rollback(model: Any, commits: Commits) -> Iterator[None]:
        with _on_class(model, "_assisted_decoding", assisting, commits), in_method("crop", one_too_few)(model, commits):
            yield

    @contextmanager
    def positions(model: Any, commits: Commits) -> Iterator[None]:
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

    def draft_row_written(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> Any:
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

    return (
        scenario_fault(
            "draft_model_writes_to_the_first_layer",
            "M11",
            "lightseekorg/tokenspeed#974",
            "The newest key of a draft model's only layer is written to the first layer of the model.",
            ASSISTED,
            "slot_stale",
            in_loop("_get_candidate_generator", draft_row_written),
            (Site.K_CACHE,),
        ),
        scenario_fault(
            "generate_keeps_a_rejected_draft",
            "M12",
            "lablup/mlxcel#1002",
            "When generate drops two drafts or more, it takes one too few from the cache.",
            ASSISTED,
            "rewind_residue",
            rollback,
        ),
        scenario_fault(
            "generate_shifts_drafts",
            "M12",
            "vllm-project/vllm#40831",
            "The positions that generate gives to drafts on a filled cache begin one too high.",
            ASSISTED,
            "rope_position_offset",
            positions,
            ROTATED,
            needs_positions,
        ),
    )


@contextmanager
def _on_class(model: Any, name: str, instead: Instead, commits: Commits) -> Iterator[None]:
    """Replace a method that the loop looks up on the class of the model."""
    owner = type(model)
    own, original = owner.__dict__.get(name), getattr(owner, name)

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        return instead(original, commits, *args, **kwargs)

    setattr(owner, name, method)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def _choices() -> tuple[Fault, ...]:
    """Faults behind the logits: every tensor is right, and the tokens are not."""

    def forbidding(with_drafts: bool) -> Way:
        """A third of the vocabulary, where drafts are verified or where tokens are chosen one by one."""

        def noting(original: Any, commits: Commits, *args: Any, **kwargs: Any) -> Any:
            commits.memory["draft model"] = kwargs.get("assistant_model") is not None
            return original(*args, **kwargs)

        def forbid(input_ids: Tensor, scores: Tensor) -> Tensor:
            return scores.masked_fill(torch.arange(scores.shape[-1], device=scores.device) % 3 == 0, -torch.inf)

        def processors(original: Any, commits: Commits, generation_config: Any, **kwargs: Any) -> Any:
            found = original(generation_config=generation_config, **kwargs)
            drafts = generation_config.prompt_lookup_num_tokens is not None or commits.memory["draft model"]
            if generation_config.num_beams == 1 and drafts == with_drafts:
                found.insert(0, lambda input_ids, scores: commits.take(scores, forbid(input_ids, scores)))
            return found

        @contextmanager
        def way(model: Any, commits: Commits) -> Iterator[None]:
            note, forbid = in_loop("generate", noting), in_loop("_get_logits_processor", processors)
            with note(model, commits), forbid(model, commits):
                yield

        return way

    def reversed_beams(original: Any, commits: Commits, **kwargs: Any) -> Any:
        sequences, *others = original(**kwargs)
        order = list(range(sequences.shape[1]))[::-1]
        return commits.take([], [value[:, order] for value in (sequences, *others)])

    def wrong_choice(name: str, mechanism: str, reference: str, where: str, needs: str, way: Way) -> Fault:
        return scenario_fault(name, mechanism, reference, where, needs, WRONG_CHOICE, way, (Site.LOGITS,))

    return (
        wrong_choice(
            "generate_keeps_forbidden_words",
            "M13",
            "huggingface/transformers#47595",
            "Tokens that another call had forbidden stay forbidden.",
            GREEDY,
            forbidding(False),
        ),
        wrong_choice(
            "generate_returns_the_worst_beam_first",
            "M23",
            "PaddlePaddle/PaddleNLP#6672",
            "The finished beams are returned in the wrong order.",
            BEAM,
            in_loop("_update_finished_beams", reversed_beams),
        ),
        wrong_choice(
            "generate_keeps_forbidden_drafts",
            "M12",
            "huggingface/transformers#47595",
            "Tokens that another call had forbidden stay forbidden where drafts are verified.",
            ASSISTED,
            forbidding(True),
        ),
    )
