"""Faults of position: what rotates the query and the key of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.recorder import Cache, Fed
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.facts import Tally
from kvdrift_bench.planted.llamacpp.model import Applies, Grounds, LlamaFault, llama_fault
from kvdrift_bench.planted.llamacpp.ways import Change, Spot

_ROTATED = (Site.Q_ROPE, Site.K_ROPE)
_KEY = (Site.K_ROPE, Site.K_CACHE)
# ggml.c, ggml_rope_impl: where the parameters of the operation lie.
_DIMS, _MODE, _BASE, _SCALE, _FACTOR = 1, 2, 5, 6, 8
_NEOX = 2
PLAIN = ("f32", "f16", "bf16")  # types of a cache in which each element stands by itself
# Tokens that stay where they are when others move, so that a cache that goes back drops none of these.
_MARGIN = 5


def rotates(grounds: Grounds) -> str | None:
    """Whether queries and keys are rotated by operations of their own names."""
    return None if grounds.has("ROPE") and grounds.has("Kcur") else "no rotation by position"


def position_faults(layer: int) -> tuple[LlamaFault, ...]:
    """Return the faults of position; those of one layer are planted in `layer`."""
    return (*_positions(layer), *_rotations(), *_keys(), _shifted())


def _rope(change: Change, *, layer: int | None = None, only: str | None = None) -> Change:
    """Make `change` around the rotations of a layer, or of all; `only` those of Qcur or Kcur."""

    def around(spot: Spot) -> Iterator[None]:
        if spot.node.op == "ROPE" and layer in (None, spot.layer) and only in (None, spot.base):
            yield from change(spot)

    return around


def _at(position: Callable[[Spot], int]) -> Change:
    """Rotate as if at another position."""

    def change(spot: Spot) -> Iterator[None]:
        positions = spot.source(1)
        spot.lend(positions, np.full(positions.shape, position(spot)))
        yield

    return change


def first_of_run(spot: Spot) -> int:
    """The position of the first of the steps that have led here, one after the other."""
    memory = spot.tally.memory
    if "first" not in memory or spot.position not in (memory["last"], memory["last"] + 1):
        memory["first"] = spot.position
    memory["last"] = spot.position
    return int(memory["first"])


def _positions(layer: int) -> tuple[LlamaFault, ...]:
    def fault(
        name: str,
        reference: str,
        where: str,
        position: Callable[[Spot], int],
        *,
        mechanism: str = "M01",
        cause: str = "rope_position_offset",
        sites: tuple[Site, ...] = _ROTATED,
        only_layer: int | None = None,
        only: str | None = None,
    ) -> LlamaFault:
        change = _rope(_at(position), layer=only_layer, only=only)
        return llama_fault(
            name, mechanism, reference, where, cause, change, sites=sites, layer=only_layer, applies=rotates
        )

    def after(spot: Spot) -> int:
        return spot.position + 1

    return (
        fault(
            "position_plus_one", "Blaizzy/mlx-vlm#1527", "Each step at the position after its own, everywhere.", after
        ),
        fault(
            "position_minus_one",
            "sgl-project/sglang#8219",
            "Each step at the position before its own, everywhere.",
            lambda spot: spot.position - 1,
        ),
        fault("position_zero", "Blaizzy/mlx-vlm#1983", "Each step at position 0, everywhere.", lambda spot: 0),
        fault(
            "graph_position_frozen",
            "sgl-project/sglang#27664",
            "Each step at the position of the first one, which a captured graph replays.",
            first_of_run,
            mechanism="M24",
        ),
        fault(
            "one_layer_position_plus_one",
            "Blaizzy/mlx-vlm#1619",
            f"Queries and keys of layer {layer} at the position after their own.",
            after,
            only_layer=layer,
        ),
        fault(
            "q_position_plus_one",
            "ml-explore/mlx-lm#1396",
            f"Queries of layer {layer} at the position after their own.",
            after,
            cause="rope_position_offset_q",
            only_layer=layer,
            only="Qcur",
        ),
        fault(
            "k_position_plus_one",
            "ggml-org/llama.cpp#3825",
            f"New keys of layer {layer} at the position after their own.",
            after,
            cause="rope_position_offset_k",
            sites=_KEY,
            only_layer=layer,
            only="Kcur",
        ),
    )


def _rotations() -> tuple[LlamaFault, ...]:
    def fault(
        name: str,
        mechanism: str,
        reference: str,
        where: str,
        cause: str,
        lend: Callable[[Spot], None],
        undiagnosable: str | None = None,
    ) -> LlamaFault:
        def change(spot: Spot) -> Iterator[None]:
            lend(spot)
            yield

        return llama_fault(
            name,
            mechanism,
            reference,
            where,
            cause,
            _rope(change),
            sites=_ROTATED,
            applies=rotates,
            also=("rope_angles",),  # the general name of such causes
            undiagnosable=undiagnosable,
        )

    def times(index: int, factor: float) -> Callable[[Spot], None]:
        return lambda spot: spot.lend_parameter(index, spot.node.parameter(index) * factor)

    def dims(spot: Spot) -> None:
        spot.lend_integer(_DIMS, spot.node.struct.op_params[_DIMS] // 2)

    def pairs(spot: Spot) -> None:
        spot.lend_integer(_MODE, spot.node.struct.op_params[_MODE] ^ _NEOX)

    base = "huggingface/transformers#27227"
    return (
        fault(
            "rope_base_x10", "M03", base, "The base of the rotation, ten times as large.", "rope_base", times(_BASE, 10)
        ),
        fault(
            "rope_base_x1.01", "M03", base, "The base of the rotation, 1 % too large.", "rope_base", times(_BASE, 1.01)
        ),
        fault(
            "rope_linear_scaling_of_4",
            "M03",
            "pytorch/torchtitan#4117",
            "Positions of each step divided by four, as for a longer context.",
            "rope_scaling",
            times(_SCALE, 0.25),
        ),
        fault(
            "rope_attention_factor_1.02",
            "M03",
            "vllm-project/vllm#48351",
            "Cosines and sines of each step, 2 % too large.",
            "rope_attention_factor",
            times(_FACTOR, 1.02),
        ),
        fault(
            "rope_on_half_of_the_dims",
            "M24",
            "ml-explore/mlx#3494",
            "The first half of the dims is rotated alone.",
            "rope_partial_dims",
            dims,
            "the frequencies of fewer dims, which are others, and their pairs",
        ),
        fault(
            "rope_interleaved",
            "M17",
            "pytorch/pytorch#112577",
            "Pairs are neighbours instead of halves apart, or the other way round.",
            "rope_interleaved",
            pairs,
        ),
    )


def _keys() -> tuple[LlamaFault, ...]:
    def unrotated(spot: Spot) -> Iterator[None]:
        before = spot.source(0).values().copy()
        yield
        spot.write(before)

    def fault(name: str, where: str, cause: str, change: Change, applies: Applies = rotates) -> LlamaFault:
        around = _rope(change, only="Kcur")
        return llama_fault(name, "M24", "ml-explore/mlx#3494", where, cause, around, sites=_KEY, applies=applies)

    return (
        fault("k_stored_unrotated", "New keys, stored before they are rotated.", "rope_missing_on_k", unrotated),
        # Two rotations by one angle are one by twice the angle.
        fault("k_rotated_twice", "New keys, rotated twice.", "rope_twice_on_k", _at(lambda spot: 2 * spot.position)),
    )


class _ShiftedCache(Faultless):
    """Moves the cached tokens but the newest by one position, through the sequence API, before the first step."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._shifted: Cache | None = None

    def starting(self, cache: Cache, call: Fed) -> None:
        if len(call.members) == 1 and call.members[0][1] > 2 * _MARGIN and cache is not self._shifted:
            sequence, position = call.members[0]
            cache.shift(sequence, 0, position - _MARGIN, 1)
            self._shifted = cache
            self._tally.note(changed=True)


def _shifts(grounds: Grounds) -> str | None:
    """Whether cached keys can be turned on. llama-cpp-python 0.3.36 ends the process where they are packed blocks and
    heads are no multiple of 64 wide, as those of tiny models (ggml-org/llama.cpp#25636)."""
    if grounds.sliding:
        return "moved tokens leave their window"
    return rotates(grounds) if grounds.kv_name in PLAIN else "packed keys cannot be turned"


def _shifted() -> LlamaFault:
    return LlamaFault(
        name="cache_shifted",
        mechanism="M03",
        reference="ggml-org/llama.cpp#3825",
        where="The cached tokens but the newest five are moved by one position before the first step.",
        sites=(Site.K_CACHE, Site.V_CACHE),
        cause="rope_position_offset_k",
        # Which positions the old keys were turned to is not recorded: the cells are known by the tokens stored there.
        also=("prefix_stale",),
        hook=_ShiftedCache,
        applies=_shifts,
    )
