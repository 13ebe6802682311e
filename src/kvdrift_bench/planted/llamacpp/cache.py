"""Faults of the cache: cells stale, lost, of another layer, in the wrong layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.llamacpp.attention import FAR, attends, first_full
from kvdrift_bench.planted.llamacpp.model import Applies, FindLayer, Grounds, LlamaFault, llama_fault
from kvdrift_bench.planted.llamacpp.positions import PLAIN
from kvdrift_bench.planted.llamacpp.ways import Change, Floats, Spot

K_OR_V = (Site.K_CACHE, Site.V_CACHE)
V_ONLY = (Site.V_CACHE, Site.ATTN_SCORES)

# Counted from the newest, so that a window of six tokens holds them.
_CELL = -4
_BLOCK = slice(-6, -2)
_FEWEST = 6  # tokens before a step that have all these cells
_SEED = 20_242

# From the cells [cell, kv head, dim] that a layer reads, up to the newest, to those that it reads instead, or to None.
Rows = Callable[[Spot, Floats], Floats | None]


def cache_faults(layer: int) -> tuple[LlamaFault, ...]:
    """Return the faults of the cache; those of one layer are planted in `layer`."""
    return (*_cells(layer), *_prefixes(), *_races(layer), *_layers(layer), *_layouts(layer))


def reading(
    keys: Rows | None = None, values: Rows | None = None, *, layer: int | None = None, least: int = _FEWEST
) -> Change:
    """Change what a layer reads of its keys and of its values, or what all do, from position `least` on."""

    def change(spot: Spot) -> Iterator[None]:
        if layer not in (None, spot.layer) or spot.position < least:
            return
        for found, put in ((spot.keys, keys), (spot.values, values)):
            new = None if found is None or put is None else put(spot, found.read())
            if found is not None and new is not None:
                found.lend(new)
        yield

    return change


def stale(rows: Floats, salt: int) -> Floats:
    """Return other content of the same kind: rows of the same size, from a seeded generator."""
    noise = np.random.default_rng(_SEED + salt).standard_normal(rows.shape)
    return np.asarray(noise * np.sqrt(np.square(rows).mean()), dtype=np.float32)


def _put(cells: slice | int, new: Callable[[Floats, int], Floats | float]) -> Rows:
    """Put `new(rows, salt)` into some cells."""

    def change(spot: Spot, rows: Floats) -> Floats:
        rows = rows.copy()
        rows[cells] = new(rows[cells], spot.layer or 0)
        return rows

    return change


def each(new: Callable[[Floats], Floats]) -> Rows:
    return lambda spot, rows: new(rows)


def _zero(rows: Floats, salt: int) -> float:
    return 0.0


cache_fault = partial(llama_fault, sites=K_OR_V, applies=attends)


def _cells(layer: int) -> tuple[LlamaFault, ...]:
    def fault(name: str, reference: str, where: str, cause: str, put: Rows, *, keys_only: bool = False) -> LlamaFault:
        change = reading(put, None if keys_only else put, layer=layer)
        return cache_fault(name, "M11", reference, where, cause, change, layer=layer)

    def everywhere(
        name: str,
        mechanism: str,
        reference: str,
        where: str,
        cause: str,
        put: Rows,
        find_layer: FindLayer | None = None,
    ) -> LlamaFault:
        change = reading(put, put, least=_FEWEST if find_layer is None else FAR)
        return cache_fault(name, mechanism, reference, where, cause, change, find_layer=find_layer)

    return (
        fault(
            "slot_aliased",
            "vllm-project/vllm#36580",
            f"One cell of layer {layer} read from the cell in front of it, keys only.",
            "slot_aliased",
            lambda spot, rows: with_cells(rows, _CELL, rows[_CELL - 1]),
            keys_only=True,
        ),
        fault(
            "slot_stale",
            "sgl-project/sglang#22819",
            f"One cell of layer {layer} holds what an earlier request left there.",
            "slot_stale",
            _put(_CELL, stale),
        ),
        fault(
            "slot_zero",
            "ml-explore/mlx-lm#1776",
            f"One cell of layer {layer} was never written and is zero.",
            "slot_zero",
            _put(_CELL, _zero),
        ),
        fault(
            "block_stale",
            "vllm-project/vllm#5412",
            f"Four neighbouring cells of layer {layer} hold what an earlier request left there.",
            "slot_stale",
            _put(_BLOCK, stale),
        ),
        fault(
            "tail_rows_stale",
            "vllm-project/vllm#42494",
            f"The last three cells of layer {layer} hold what an earlier request left there.",
            "slot_stale",
            _put(slice(-3, None), stale),
        ),
        fault(
            "last_slots_of_another_page",
            "vllm-project/vllm#16370",
            f"The new cell of layer {layer} was written to a wrong page, so that it stays zero.",
            "slot_zero",
            _put(-1, _zero),
        ),
        everywhere(
            "first_slot_never_written",
            "M07",
            "TrenTorch/TrenTorch#192",
            "Cell 0 of every layer was never written and is zero.",
            "slot_zero",
            _put(0, _zero),
            first_full,
        ),
        everywhere(
            "draft_token_in_current_slot",
            "M12",
            "vllm-project/vllm#9730",
            "The new cell is that of a rejected token, in every layer.",
            "slot_stale",
            _put(-1, stale),
        ),
        cache_fault(
            "value_slots_exchanged",
            "M11",
            "huggingface/text-generation-inference#2711",
            f"Two cells of the values of layer {layer} exchanged, those of the keys not.",
            "v_permuted",
            reading(None, lambda spot, rows: with_cells(rows, [-5, -3], rows[[-3, -5]]), layer=layer),
            sites=V_ONLY,
            layer=layer,
        ),
        cache_fault(
            "keys_rolled",
            "M11",
            "vllm-project/vllm#36580",
            f"All keys of layer {layer} one cell on: every token is attended to with the key of the one before it.",
            "slot_aliased",
            reading(lambda spot, rows: np.roll(rows, 1, axis=0), layer=layer),
            layer=layer,
        ),
        cache_fault(
            "slot_aliased_where_packed",
            "M11",
            "ggml-org/llama.cpp#23717",
            f"One cell of layer {layer} read from the cell in front of it, keys only, where cells are packed blocks.",
            "slot_aliased",
            reading(
                lambda spot, rows: with_cells(rows, _CELL, rows[_CELL - 1]) if _is_packed(spot) else None, layer=layer
            ),
            layer=layer,
            applies=packed,
            keyed_to_dtype=True,
        ),
    )


def _is_packed(spot: Spot) -> bool:
    found = spot.keys or spot.values
    return found is not None and not found.operand.is_plain


def packed(grounds: Grounds) -> str | None:
    """Whether the cache as it is shipped holds packed blocks."""
    return f"the cache holds {grounds.kv_name}" if grounds.kv_name in PLAIN else attends(grounds)


def with_cells(rows: Floats, cells: int | slice | list[int], new: Floats | float) -> Floats:
    rows = rows.copy()
    rows[cells] = new
    return rows


def _prefixes() -> tuple[LlamaFault, ...]:
    first = slice(0, 4)

    def fault(name: str, reference: str, where: str, put: Rows) -> LlamaFault:
        change = reading(put, put, least=FAR)
        return cache_fault(name, "M13", reference, where, "prefix_stale", change, find_layer=first_full)

    return (
        fault(
            "prefix_of_other_weights",
            "vllm-project/vllm#44701",
            "The first four cells of every layer, reused from a request that ran with an adapter.",
            _put(first, lambda rows, salt: rows + np.float32(0.02) * stale(rows, salt)),
        ),
        fault(
            "prefix_of_another_prompt",
            "LMCache/LMCache#4086",
            "The first four cells of every layer, reused from another prompt.",
            _put(first, stale),
        ),
    )


def _races(layer: int) -> tuple[LlamaFault, ...]:
    def racing(spot: Spot, rows: Floats) -> Floats | None:
        """A copy that is overtaken in every second step, whatever the token."""
        memory = spot.tally.memory
        if spot.keys is not None:
            memory["steps"] = memory.get("steps", 0) + 1
        return with_cells(rows, _BLOCK, stale(rows[_BLOCK], layer)) if memory["steps"] % 2 else None

    def torn(spot: Spot, rows: Floats) -> Floats:
        half = rows.shape[-1] // 2
        fresh = rows[_CELL]
        return with_cells(rows, _CELL, np.concatenate([fresh[:, :half], stale(fresh, layer)[:, half:]], axis=-1))

    return (
        cache_fault(
            "racing_block",
            "M14",
            "ikawrakow/ik_llama.cpp#2083",
            f"Four cells of layer {layer} stale in every second step.",
            "slot_stale",
            reading(racing, racing, layer=layer),
            layer=layer,
        ),
        cache_fault(
            "torn_row",
            "M14",
            "ROCm/ATOM#2132",
            f"The second half of one key of layer {layer} was copied before it was written.",
            "slot_half_stale",
            reading(torn, layer=layer),
            layer=layer,
        ),
    )


def _layers(layer: int) -> tuple[LlamaFault, ...]:
    """Faults that need what the layer below holds: it is remembered as it is read there."""

    def below(kind: str) -> Rows:
        def change(spot: Spot, rows: Floats) -> Floats | None:
            memory = spot.tally.memory
            if spot.layer == layer - 1:
                memory[kind] = rows.copy()
            return memory.get(kind) if spot.layer == layer else None

        return change

    return (
        cache_fault(
            "cache_of_the_layer_below",
            "M15",
            "Blaizzy/mlx-vlm#1138",
            f"Layer {layer} reads the cache of layer {layer - 1}.",
            "kv_of_other_layer",
            reading(below("k"), below("v")),
            layer=layer,
        ),
        cache_fault(
            "values_of_the_layer_below",
            "M17",
            "local-inference-lab/vllm#17",
            f"Layer {layer} reads the values of layer {layer - 1}.",
            "kv_of_other_layer",
            reading(None, below("v")),
            sites=V_ONLY,
            layer=layer,
        ),
    )


def _layouts(layer: int) -> tuple[LlamaFault, ...]:
    def remembered(spot: Spot, rows: Floats) -> None:
        spot.tally.memory["keys"] = rows.copy()

    def keys(spot: Spot, rows: Floats) -> Floats | None:
        known: Floats = spot.tally.memory["keys"]
        return known if known.shape == rows.shape else None

    def transposed(spot: Spot, rows: Floats) -> Floats:
        """Written as [cell, head, dim], read as [head, cell, dim]."""
        return rows.reshape(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(1, 0, 2)

    def fault(name: str, reference: str, where: str, cause: str, change: Change, applies: Applies) -> LlamaFault:
        return cache_fault(name, "M17", reference, where, cause, change, sites=V_ONLY, layer=layer, applies=applies)

    return (
        fault(
            "values_transposed",
            "pytorch/pytorch#112577",
            f"The values of layer {layer}, with cells and heads exchanged.",
            "v_transposed",
            reading(None, transposed, layer=layer),
            attends,
        ),
        fault(
            "values_rolled",
            "tinygrad/tinygrad#2267",
            f"The values of layer {layer}, one cell on.",
            "v_permuted",
            reading(None, lambda spot, rows: np.roll(rows, 1, axis=0), layer=layer),
            attends,
        ),
        fault(
            "keys_read_as_values",
            "ikawrakow/ik_llama.cpp#1592",
            f"Layer {layer} reads its keys as values too.",
            "k_read_as_v",
            reading(remembered, keys, layer=layer),
            attends,
        ),
        cache_fault(
            "kv_heads_written_alike",
            "M16",
            "NVIDIA/TensorRT-LLM#6573",
            "Every kv head of every layer holds the first one.",
            "head_group_wrong",
            reading(each(_first_head), each(_first_head)),
        ),
    )


def _first_head(rows: Floats) -> Floats:
    return np.repeat(rows[:, :1], rows.shape[1], axis=1)
