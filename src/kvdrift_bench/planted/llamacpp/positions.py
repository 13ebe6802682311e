"""Faults of position: what rotates the query and the key of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np

from kvdrift.engines.llamacpp.calls import Cache, Fed
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.registry import fault, faults
from kvdrift_bench.planted.llamacpp.ways import Change, Counting, Spot, in_one_layer, lend_factor

# ggml.c, ggml_rope_impl: where the parameters of the operation lie.
_DIMS, _MODE, _BASE, _SCALE, _FACTOR = 1, 2, 5, 6, 8
_NEOX = 2
PLAIN = ("f32", "f16", "bf16")  # types of a cache in which each element stands by itself
# Tokens that stay where they are when others move, so that a cache that goes back drops none of these.
_MARGIN = 5


def rotates(grounds: Grounds) -> str | None:
    """Whether queries and keys are rotated by operations of their own names."""
    return None if grounds.has("ROPE") and grounds.has("Kcur") else "no rotation by position"


def in_rotation(change: Change, only: str | None = None) -> Change:
    """Make a change around the rotations, or around those of `only` Qcur or Kcur."""

    @wraps(change)
    def around(spot: Spot) -> Iterator[None]:
        if spot.node.op == "ROPE" and only in (None, spot.base):
            yield from change(spot)

    return around


def rotated_at(only: str | None = None) -> Callable[[Callable[[Spot], int]], Change]:
    """Rotate as if at the position that the function returns; `only` Qcur or Kcur."""

    def seam(position: Callable[[Spot], int]) -> Change:
        @wraps(position)
        def change(spot: Spot) -> Iterator[None]:
            positions = spot.source(1)
            spot.lend(positions, np.full(positions.shape, position(spot)))
            yield

        return in_rotation(change, only)

    return seam


# ------------------------------------------------------------------------------------------------------ positions


@fault(rotates)
@rotated_at()
def position_plus_one(spot: Spot) -> int:
    return spot.position + 1


@fault(rotates)
@rotated_at()
def position_minus_one(spot: Spot) -> int:
    return spot.position - 1


@fault(rotates)
@rotated_at()
def position_zero(spot: Spot) -> int:
    return 0


@fault(rotates)
@rotated_at()
def graph_position_frozen(spot: Spot) -> int:
    """The position of the first of the steps that have led here, one after the other."""
    memory = spot.tally.memory
    if "first" not in memory or spot.position not in (memory["last"], memory["last"] + 1):
        memory["first"] = spot.position
    memory["last"] = spot.position
    return int(memory["first"])


@fault(rotates)
@in_one_layer
@rotated_at()
def one_layer_position_plus_one(spot: Spot) -> int:
    return spot.position + 1


@fault(rotates)
@in_one_layer
@rotated_at("Qcur")
def q_position_plus_one(spot: Spot) -> int:
    return spot.position + 1


@fault(rotates)
@in_one_layer
@rotated_at("Kcur")
def k_position_plus_one(spot: Spot) -> int:
    return spot.position + 1


# ------------------------------------------------------------------------------------------------------ rotations


@faults(
    {
        "rope_base_x10": (_BASE, 10),
        "rope_base_x1.01": (_BASE, 1.01),
        "rope_linear_scaling_of_4": (_SCALE, 0.25),
        "rope_attention_factor_1.02": (_FACTOR, 1.02),
    },
    rotates,
)
def rope_parameter(which: tuple[int, float]) -> Change:
    """A parameter of the operation, larger by a factor."""

    def scaled(spot: Spot) -> Iterator[None]:
        lend_factor(spot, *which)
        yield

    return in_rotation(scaled)


@fault(rotates)
@in_rotation
def rope_on_half_of_the_dims(spot: Spot) -> Iterator[None]:
    spot.lend_integer(_DIMS, spot.node.struct.op_params[_DIMS] // 2)
    yield


@fault(rotates)
@in_rotation
def rope_interleaved(spot: Spot) -> Iterator[None]:
    spot.lend_integer(_MODE, spot.node.struct.op_params[_MODE] ^ _NEOX)
    yield


@fault(rotates)
@in_rotation
def k_stored_unrotated(spot: Spot) -> Iterator[None]:
    if spot.base == "Kcur":
        before = spot.source(0).values().copy()
        yield
        spot.write(before)


@fault(rotates)
@rotated_at("Kcur")
def k_rotated_twice(spot: Spot) -> int:
    """Two rotations by one angle are one by twice the angle."""
    return 2 * spot.position


# ------------------------------------------------------------------------------------------------------ moved tokens


def _shifts(grounds: Grounds) -> str | None:
    """Whether cached keys can be turned on. llama-cpp-python 0.3.36 ends the process where they are packed blocks and
    heads are not a multiple of 64 wide, as those of tiny models (ggml-org/llama.cpp#25636)."""
    if grounds.sliding:
        return "moved tokens leave their window"
    return rotates(grounds) if grounds.kv_name in PLAIN else "packed keys cannot be turned"


@fault(_shifts, name="cache_shifted")
class ShiftedCache(Counting):
    """Moves the cached tokens but the newest by one position, through the sequence API, before the first step."""

    def __init__(self, tally: Tally) -> None:
        super().__init__(tally)
        self._shifted: Cache | None = None

    def starting(self, cache: Cache, call: Fed) -> None:
        if len(call.members) == 1 and call.members[0][1] > 2 * _MARGIN and cache is not self._shifted:
            sequence, position = call.members[0]
            cache.shift(sequence, 0, position - _MARGIN, 1)
            self._shifted = cache
            self.tally.note(changed=True)
