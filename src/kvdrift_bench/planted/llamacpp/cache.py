"""Faults of the cache: cells stale, lost, of another layer, in the wrong layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np

from kvdrift_bench.planted.llamacpp.attention import FAR, attends, first_full
from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.positions import PLAIN
from kvdrift_bench.planted.llamacpp.registry import fault
from kvdrift_bench.planted.llamacpp.ways import Change, Floats, Spot, in_one_layer

# Counted from the newest, so that a window of six tokens holds them.
_CELL = -4
_BLOCK = slice(-6, -2)
_FIRST_FOUR = slice(0, 4)
_FEWEST = 6  # tokens before a step that have all these cells
_SEED = 20_242

# From the cells [cell, kv head, dim] that a layer reads, up to the newest, to those that it reads instead, or to None.
Rows = Callable[[Spot, Floats], Floats | None]


def reading(keys: Rows | None = None, values: Rows | None = None, *, least: int = _FEWEST) -> Change:
    """Change what layers read of their keys and of their values, from position `least` on."""

    def change(spot: Spot) -> Iterator[None]:
        if spot.position < least:
            return
        for found, put in ((spot.keys, keys), (spot.values, values)):
            new = None if found is None or put is None else put(spot, found.read())
            if found is not None and new is not None:
                found.lend(new)
        yield

    return change


def in_rows(put: Rows) -> Change:
    """Change keys and values that are read alike."""
    return wraps(put)(reading(put, put))


def in_far_rows(put: Rows) -> Change:
    """Change keys and values that are read alike, from where the first tokens have left the windows."""
    return wraps(put)(reading(put, put, least=FAR))


def in_keys(put: Rows) -> Change:
    """Change the keys that are read."""
    return wraps(put)(reading(put))


def in_values(put: Rows) -> Change:
    """Change the values that are read."""
    return wraps(put)(reading(None, put))


def with_cells(rows: Floats, cells: int | slice | list[int], new: Floats | float) -> Floats:
    """Return a copy of [cell, kv head, dim] with `new` in some cells."""
    rows = rows.copy()
    rows[cells] = new
    return rows


def _stale(rows: Floats, salt: int) -> Floats:
    """Other content of the same kind: rows of the same size, from a seeded generator."""
    noise = np.random.default_rng(_SEED + salt).standard_normal(rows.shape)
    return np.asarray(noise * np.sqrt(np.square(rows).mean()), dtype=np.float32)


def _with_stale(spot: Spot, rows: Floats, cells: int | slice) -> Floats:
    """Rows with what an earlier request left in some cells."""
    rows = rows.copy()
    rows[cells] = _stale(rows[cells], spot.layer or 0)
    return rows


def packed(grounds: Grounds) -> str | None:
    """Whether the cache as it is shipped holds packed blocks."""
    return f"the cache holds {grounds.kv_name}" if grounds.kv_name in PLAIN else attends(grounds)


# ------------------------------------------------------------------------------------------------------ cells


@fault(attends)
@in_one_layer
@in_keys
def slot_aliased(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, _CELL, rows[_CELL - 1])


@fault(packed)
@in_one_layer
@in_keys
def slot_aliased_where_packed(spot: Spot, rows: Floats) -> Floats | None:
    found = spot.keys
    is_packed = found is not None and not found.operand.is_plain
    return with_cells(rows, _CELL, rows[_CELL - 1]) if is_packed else None


@fault(attends)
@in_one_layer
@in_rows
def slot_stale(spot: Spot, rows: Floats) -> Floats:
    return _with_stale(spot, rows, _CELL)


@fault(attends)
@in_one_layer
@in_rows
def slot_zero(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, _CELL, 0.0)


@fault(attends)
@in_one_layer
@in_rows
def block_stale(spot: Spot, rows: Floats) -> Floats:
    return _with_stale(spot, rows, _BLOCK)


@fault(attends)
@in_one_layer
@in_rows
def tail_rows_stale(spot: Spot, rows: Floats) -> Floats:
    return _with_stale(spot, rows, slice(-3, None))


@fault(attends)
@in_one_layer
@in_rows
def last_slots_of_another_page(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, -1, 0.0)


@fault(attends, first=first_full)
@in_far_rows
def first_slot_never_written(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, 0, 0.0)


@fault(attends)
@in_rows
def draft_token_in_current_slot(spot: Spot, rows: Floats) -> Floats:
    return _with_stale(spot, rows, -1)


@fault(attends)
@in_one_layer
@in_values
def value_slots_exchanged(spot: Spot, rows: Floats) -> Floats:
    return with_cells(rows, [-5, -3], rows[[-3, -5]])


@fault(attends)
@in_one_layer
@in_keys
def keys_rolled(spot: Spot, rows: Floats) -> Floats:
    return np.roll(rows, 1, axis=0)


# ------------------------------------------------------------------------------------------------ prefixes and races


@fault(attends, first=first_full)
@in_far_rows
def prefix_of_other_weights(spot: Spot, rows: Floats) -> Floats:
    rows = rows.copy()
    rows[_FIRST_FOUR] += np.float32(0.02) * _stale(rows[_FIRST_FOUR], spot.layer or 0)
    return rows


@fault(attends, first=first_full)
@in_far_rows
def prefix_of_another_prompt(spot: Spot, rows: Floats) -> Floats:
    return _with_stale(spot, rows, _FIRST_FOUR)


@fault(attends)
@in_one_layer
@in_rows
def racing_block(spot: Spot, rows: Floats) -> Floats | None:
    """A copy that is overtaken in every second step, whatever the token."""
    memory = spot.tally.memory
    if spot.keys is not None:
        memory["steps"] = memory.get("steps", 0) + 1
    stale = _stale(rows[_BLOCK], spot.layer or 0)
    return with_cells(rows, _BLOCK, stale) if memory["steps"] % 2 else None


@fault(attends)
@in_one_layer
@in_keys
def torn_row(spot: Spot, rows: Floats) -> Floats:
    half = rows.shape[-1] // 2
    fresh = rows[_CELL]
    torn = np.concatenate([fresh[:, :half], _stale(fresh, spot.layer or 0)[:, half:]], axis=-1)
    return with_cells(rows, _CELL, torn)


# ------------------------------------------------------------------------------------------------ layers and layouts


def _of_the_layer_below(spot: Spot, rows: Floats, kind: str) -> Floats | None:
    """What the layer below the faulty one holds, which is remembered as it is read there."""
    memory, layer = spot.tally.memory, spot.tally.fault_layer
    if spot.layer is not None and spot.layer + 1 == layer:
        memory[kind] = rows.copy()
    return memory.get(kind) if spot.layer == layer else None


def _keys_below(spot: Spot, rows: Floats) -> Floats | None:
    return _of_the_layer_below(spot, rows, "keys")


def _values_below(spot: Spot, rows: Floats) -> Floats | None:
    return _of_the_layer_below(spot, rows, "values")


@fault(attends)
def cache_of_the_layer_below(spot: Spot) -> Iterator[None]:
    yield from reading(_keys_below, _values_below)(spot)


@fault(attends)
@in_values
def values_of_the_layer_below(spot: Spot, rows: Floats) -> Floats | None:
    return _values_below(spot, rows)


@fault(attends)
@in_one_layer
@in_values
def values_transposed(spot: Spot, rows: Floats) -> Floats:
    """Written as [cell, head, dim], read as [head, cell, dim]."""
    return rows.reshape(rows.shape[1], rows.shape[0], rows.shape[2]).transpose(1, 0, 2)


@fault(attends)
@in_one_layer
@in_values
def values_rolled(spot: Spot, rows: Floats) -> Floats:
    return np.roll(rows, 1, axis=0)


def _remember(spot: Spot, rows: Floats) -> None:
    spot.tally.memory["keys"] = rows.copy()


def _remembered(spot: Spot, rows: Floats) -> Floats | None:
    keys: Floats = spot.tally.memory["keys"]
    return keys if keys.shape == rows.shape else None


@fault(attends)
@in_one_layer
def keys_read_as_values(spot: Spot) -> Iterator[None]:
    yield from reading(_remember, _remembered)(spot)


@fault(attends)
@in_rows
def kv_heads_written_alike(spot: Spot, rows: Floats) -> Floats:
    return np.repeat(rows[:, :1], rows.shape[1], axis=1)
