"""Faults of the cache: slots stale, lost, exchanged, of another layer, read in the wrong layout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import ALL_DTYPES, Applies, Fault, FindLayer
from kvdrift_bench.planted.torch.parts import first_sliding, is_half, needs_cache, needs_window
from kvdrift_bench.planted.torch.ways import AttentionCall, CacheCall, Way, in_attention, in_cache, planted

K_OR_V = (Site.K_CACHE, Site.V_CACHE)
V_ONLY = (Site.V_CACHE, Site.ATTN_SCORES)

_SLOT = 5
_BLOCK = slice(4, 8)
_SEED = 20_241
_RACE_SEED = 8

Rows = tuple[Tensor, Tensor]


def cache_fault(
    name: str,
    mechanism: str,
    reference: str,
    where: str,
    cause: str,
    *ways: Way,
    sites: tuple[Site, ...] = K_OR_V,
    layer: int | None = None,
    find_layer: FindLayer | None = None,
    dtypes: tuple[str, ...] = ALL_DTYPES,
    applies: Applies = needs_cache,
) -> Fault:
    """Return a fault of the cache."""
    return Fault(
        name=name,
        mechanism=mechanism,
        reference=reference,
        where=where,
        sites=sites,
        cause=cause,
        plant=planted(*ways),
        layer=layer,
        find_layer=find_layer,
        dtypes=dtypes,
        applies=applies,
    )


def cache_faults(layer: int) -> tuple[Fault, ...]:
    """Return the faults of the cache; those of one layer are planted in `layer`."""
    return (*_slots(layer), *_rings(), *_prefixes(), *_races(layer))


def reading(layer: int | None, change: Callable[[CacheCall], Rows | None]) -> Way:
    """Return the way that changes what `layer` reads, or every layer."""
    return in_cache(read=lambda call: change(call) if layer in (None, call.layer) and _is_long_enough(call) else None)


def _is_long_enough(call: CacheCall) -> bool:
    """The rows that the faults touch must be there; a shorter cache is left alone."""
    return call.keys.shape[2] > _SLOT


def writing(layer: int | None, change: Callable[[CacheCall], Rows | None]) -> Way:
    """Return the way that changes what `layer` stores, or every layer."""
    return in_cache(write=lambda call: change(call) if layer in (None, call.layer) else None)


def stale(rows: Tensor, salt: int) -> Tensor:
    """Return other content of the same kind: rows of the same size in every dim, from a seeded generator."""
    generator = torch.Generator().manual_seed(_SEED + salt)
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float32).to(rows.device, rows.dtype)
    return noise * rows.square().mean().sqrt()


def with_rows(tensor: Tensor, rows: slice | int | list[int], new: Tensor | float) -> Tensor:
    """Return a copy of [1, head, row, dim] with `new` in some rows."""
    tensor = tensor.clone()
    tensor[:, :, rows] = new
    return tensor


def _both(rows: slice | int | list[int], new: Callable[[Tensor, int], Tensor | float]) -> Callable[[CacheCall], Rows]:
    """Return the change that puts `new(rows, salt)` into some rows of keys and values."""

    def change(call: CacheCall) -> Rows:
        return (
            with_rows(call.keys, rows, new(call.keys[:, :, rows], call.layer)),
            with_rows(call.values, rows, new(call.values[:, :, rows], -1 - call.layer)),
        )

    return change


def _slots(layer: int) -> tuple[Fault, ...]:
    def fault(name: str, reference: str, where: str, cause: str, change: Callable[[CacheCall], Rows | None]) -> Fault:
        return cache_fault(name, "M11", reference, where, cause, reading(layer, change), layer=layer)

    def swapped(call: CacheCall) -> Rows:
        order = list(range(call.values.shape[2]))
        order[2], order[6] = order[6], order[2]
        return call.keys, call.values[:, :, order]

    return (
        fault(
            "slot_aliased",
            "vllm-project/vllm#36580",
            f"Slot {_SLOT} of layer {layer} read from slot {_SLOT - 1}, keys only.",
            "slot_aliased",
            lambda call: (with_rows(call.keys, _SLOT, call.keys[:, :, _SLOT - 1]), call.values),
        ),
        fault(
            "slot_stale",
            "sgl-project/sglang#22819",
            f"Slot {_SLOT} of layer {layer} holds what an earlier request left there.",
            "slot_stale",
            _both(_SLOT, stale),
        ),
        fault(
            "slot_zero",
            "ml-explore/mlx-lm#1776",
            f"Slot {_SLOT} of layer {layer} was never written and is zero.",
            "slot_zero",
            _both(_SLOT, lambda rows, salt: 0.0),
        ),
        cache_fault(
            "value_slots_exchanged",
            "M11",
            "huggingface/text-generation-inference#2711",
            f"Two slots of the values of layer {layer} exchanged, those of the keys not.",
            "v_permuted",
            reading(layer, swapped),
            sites=V_ONLY,
            layer=layer,
        ),
        fault(
            "block_stale",
            "vllm-project/vllm#5412",
            f"Four neighbouring slots of layer {layer} hold what an earlier request left there.",
            "slot_stale",
            _both(_BLOCK, stale),
        ),
        fault(
            "tail_rows_stale",
            "vllm-project/vllm#42494",
            f"The last three slots of layer {layer} hold what an earlier request left there.",
            "slot_stale",
            _both(slice(-3, None), stale),
        ),
        cache_fault(
            "last_slots_of_another_page",
            "M11",
            "vllm-project/vllm#16370",
            f"New rows of layer {layer} go to a wrong page, so that their own slots stay zero.",
            "slot_zero",
            writing(layer, lambda call: (torch.zeros_like(call.keys), torch.zeros_like(call.values))),
            layer=layer,
        ),
        cache_fault(
            "first_slot_never_written",
            "M07",
            "TrenTorch/TrenTorch#192",
            "Slot 0 of every layer was never written and is zero.",
            "slot_zero",
            reading(None, _both(0, lambda rows, salt: 0.0)),
        ),
        cache_fault(
            "last_prompt_slot_overwritten",
            "M12",
            "xLLM-AI/xllm#1944",
            "The slot in front of the current one holds the rows of a placeholder token, in every layer.",
            "slot_stale",
            reading(None, _both(slice(-2, -1), stale)),
        ),
        cache_fault(
            "draft_token_in_current_slot",
            "M12",
            "vllm-project/vllm#9730",
            "New rows are those of a rejected token, in every layer.",
            "slot_stale",
            writing(None, lambda call: (stale(call.keys, call.layer), stale(call.values, -1 - call.layer))),
        ),
    )


def _rings() -> tuple[Fault, ...]:
    def not_advanced(call: CacheCall) -> Rows | None:
        """The newest row lands on the second newest instead of on the oldest one, which stays: one row is lost and
        one is there that has left the window."""
        full = call.keys.shape[2] >= 8 and call.layers[call.layer].is_sliding
        if not full:
            return None
        order = list(range(call.keys.shape[2]))
        order[-2] = order[0]
        return call.keys[:, :, order], call.values[:, :, order]

    def remember(call: CacheCall) -> None:
        """Keep the rows of the window by their positions, of one sequence at one dtype."""
        layer = call.layers[call.layer]
        if not (layer.is_initialized and layer.is_sliding):
            return
        known = call.commits.memory.setdefault(call.layer, {})
        for index in range(layer.keys.shape[2]):
            position = call.commits.past - layer.keys.shape[2] + index
            rows = layer.keys[:, :, index : index + 1].clone(), layer.values[:, :, index : index + 1].clone()
            before = known.get(position)
            if before is not None and not (
                before[0].dtype == rows[0].dtype and torch.allclose(before[0], rows[0], rtol=0.1, atol=0.1)
            ):
                known.clear()
            known[position] = rows

    def wider(call: AttentionCall) -> bool:
        """One key more than the window holds: the row that left it last, which needs no order among the keys."""
        window = call.module.config.sliding_window
        left = call.commits.memory.get(call.layer, {}).get(call.commits.past - window)
        if left is None or call.key.shape[2] != window or left[0].dtype != call.key.dtype:
            return False
        call.key, call.value = torch.cat([call.key, left[0]], 2), torch.cat([call.value, left[1]], 2)
        if call.mask is not None:
            call.mask = torch.cat([call.mask, call.mask[..., -1:]], -1)
        return True

    return (
        cache_fault(
            "window_plus_one",
            "M09",
            "microsoft/onnxruntime#25927",
            "The key that left the sliding window last, read in addition.",
            "window_off_by_one",
            in_cache(write=remember),
            in_attention(wider),
            sites=(Site.ATTN_SCORES, Site.ATTN_PROBS),
            find_layer=first_sliding,
            applies=needs_window,
        ),
        cache_fault(
            "ring_not_advanced",
            "M09",
            "huggingface/transformers#37574",
            "A full sliding window keeps its oldest row twice and loses the one in front of the newest.",
            "slot_aliased",
            reading(None, not_advanced),
            find_layer=first_sliding,
            applies=needs_window,
        ),
    )


def _prefixes() -> tuple[Fault, ...]:
    def other_weights(call: CacheCall) -> Rows:
        """As if a small adapter had been active when the first four rows were computed."""
        first = slice(0, 4)
        keys, values = call.keys[:, :, first], call.values[:, :, first]
        return (
            with_rows(call.keys, first, keys + 0.02 * stale(keys, call.layer)),
            with_rows(call.values, first, values + 0.02 * stale(values, -1 - call.layer)),
        )

    return (
        cache_fault(
            "prefix_of_other_weights",
            "M13",
            "vllm-project/vllm#44701",
            "The first four rows of every layer, reused from a request that ran with an adapter.",
            "prefix_stale",
            reading(None, other_weights),
        ),
        cache_fault(
            "prefix_of_another_prompt",
            "M13",
            "LMCache/LMCache#4086",
            "The first four rows of every layer, reused from another prompt.",
            "prefix_stale",
            reading(None, _both(slice(0, 4), stale)),
        ),
    )


def _races(layer: int) -> tuple[Fault, ...]:
    def racing(call: CacheCall) -> Rows | None:
        """A copy that is sometimes overtaken; which step it hits depends on all steps before."""
        generator = call.commits.memory.setdefault("generator", torch.Generator().manual_seed(_RACE_SEED))
        if float(torch.rand(1, generator=generator)) < 0.5:
            return None
        return _both(_BLOCK, stale)(call)

    def once(call: CacheCall) -> Rows | None:
        """A copy that is overtaken in the second decode step, and never again."""
        steps: int = call.commits.memory.get("steps", 0) + 1
        call.commits.memory["steps"] = steps
        return _both(_BLOCK, stale)(call) if steps == 2 else None

    def torn(call: CacheCall) -> Rows:
        half = call.keys.shape[-1] // 2
        row = call.keys[:, :, _SLOT]
        fresh_and_stale = torch.cat([row[..., :half], stale(row, call.layer)[..., half:]], dim=-1)
        return with_rows(call.keys, _SLOT, fresh_and_stale), call.values

    return (
        cache_fault(
            "racing_block",
            "M14",
            "ikawrakow/ik_llama.cpp#2083",
            f"Four slots of layer {layer} stale in about every second step: a seeded race.",
            "slot_stale",
            reading(layer, racing),
            layer=layer,
        ),
        cache_fault(
            "block_stale_once",
            "M14",
            "vllm-project/vllm#45704",
            f"Four slots of layer {layer} stale in one single decode step, which no other run repeats.",
            "slot_stale",
            reading(layer, once),
            layer=layer,
        ),
        cache_fault(
            "torn_row",
            "M14",
            "ROCm/ATOM#2132",
            f"The second half of the key in slot {_SLOT} of layer {layer} was copied before it was written.",
            "slot_half_stale",
            reading(layer, torn),
            layer=layer,
        ),
        cache_fault(
            "rows_never_copied",
            "M14",
            "huggingface/transformers#42688",
            "New rows of every layer fail to be copied into the cache and stay zero.",
            "slot_zero",
            writing(None, lambda call: (torch.zeros_like(call.keys), torch.zeros_like(call.values))),
        ),
    )


def only_half(change: Callable[[CacheCall], Rows]) -> Callable[[CacheCall], Rows | None]:
    """Return the change that is made only where keys have a 16-bit dtype."""
    return lambda call: change(call) if is_half(call.keys) else None
