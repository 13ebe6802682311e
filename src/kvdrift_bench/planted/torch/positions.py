"""Faults of position: where a decode step believes to be, and how it rotates queries and keys."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from torch import Tensor, nn

from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.torch.model import ABOVE_BF16, HALF_DTYPES, Commits, Fault
from kvdrift_bench.planted.torch.parts import (
    first_sliding,
    frequencies,
    is_half,
    needs_positions,
    needs_rotation,
    needs_window,
    rotaries,
    window_of,
)
from kvdrift_bench.planted.torch.ways import Rotation, Way, in_positions, in_rotation, planted
from kvdrift_bench.planted.torch.ways_modules import in_attribute, in_outputs

# A model of learned positions adds them to the embedding, in front of the first layer.
_POSITION = (Site.LAYER_IN, Site.Q_ROPE, Site.K_ROPE)
_ROTATED = (Site.Q_ROPE, Site.K_ROPE)
_KEY = (Site.K_ROPE, Site.K_CACHE)

# Beyond this many tokens a model with two sets of RoPE factors takes the long ones.
_SWITCH = 12
# What one more token turns: the offset of a position fault.
_STALE_DELTA = 17


def position_faults(layer: int) -> tuple[Fault, ...]:
    """Return the faults of position and rotation; those of one layer are planted in `layer`."""
    return (*_offsets(layer), *_schedules(), *_precision(), *_rotations(layer))


def _offsets(layer: int) -> tuple[Fault, ...]:
    def fault(
        name: str, mechanism: str, reference: str, where: str, change: Callable[[Tensor, Commits], Tensor | None]
    ) -> Fault:
        return Fault(
            name=name,
            mechanism=mechanism,
            reference=reference,
            where=where,
            sites=_POSITION,
            cause="rope_position_offset",
            plant=planted(in_positions(change)),
            applies=needs_positions,
        )

    def one_side(name: str, reference: str, *, q: int, k: int, mechanism: str = "M01") -> Fault:
        side = "query" if k == 0 else "key" if q == 0 else "query and the key"
        return Fault(
            name=name,
            mechanism=mechanism,
            reference=reference,
            where=f"The {side} of layer {layer} rotated {q or k} positions too far.",
            layer=layer,
            sites=_ROTATED if q else _KEY,
            cause="rope_position_offset" if q and k else "rope_position_offset_q" if q else "rope_position_offset_k",
            plant=planted(in_rotation(partial(_turn, only=layer, q=q, k=k))),
            applies=needs_rotation,
        )

    return (
        fault(
            "position_plus_one",
            "M01",
            "Blaizzy/mlx-vlm#1527",
            "The positions that the model is called with, one too large.",
            lambda right, commits: right + 1,
        ),
        fault(
            "position_minus_one",
            "M01",
            "sgl-project/sglang#8219",
            "The positions that the model is called with, one too small.",
            lambda right, commits: right - 1,
        ),
        fault(
            "position_zero",
            "M01",
            "Blaizzy/mlx-vlm#1983",
            "The positions that the model is called with count from 0, as if nothing were cached.",
            lambda right, commits: right - commits.past,
        ),
        fault(
            "position_of_another_delta",
            "M01",
            "huggingface/transformers#43952",
            "The positions that the model is called with carry the delta of an earlier prompt.",
            lambda right, commits: right + _STALE_DELTA,
        ),
        fault(
            "position_of_another_row",
            "M02",
            "Blaizzy/mlx-vlm#1143",
            "The positions that the model is called with carry the delta of the request admitted last.",
            lambda right, commits: right + 2 * commits.past,
        ),
        fault(
            "graph_position_frozen",
            "M24",
            "sgl-project/sglang#27664",
            "The position that was captured with the first decode step is replayed in all later ones.",
            _frozen,
        ),
        Fault(
            name="position_capped_at_window",
            mechanism="M10",
            reference="huggingface/transformers#38156",
            where="The positions that the model is called with, taken from a layer whose window is full.",
            sites=_POSITION,
            cause="rope_position_offset",
            plant=planted(_capped),
            applies=needs_window,
        ),
        one_side("q_position_plus_one", "ml-explore/mlx-lm#1396", q=1, k=0),
        one_side("k_position_plus_one", "ggml-org/llama.cpp#3825", q=0, k=1),
        one_side("one_layer_position_plus_one", "Blaizzy/mlx-vlm#1619", q=1, k=1),
        one_side("q_position_advanced_by_donor", "ml-explore/mlx-lm#1396", q=11, k=0, mechanism="M02"),
    )


def _capped(model: nn.Module, commits: Commits) -> AbstractContextManager[None]:
    window = window_of(model, first_sliding(model)) or 0
    return in_positions(lambda right, commits: right.clamp_max(window))(model, commits)


def _frozen(right: Tensor, commits: Commits) -> Tensor | None:
    captured: Tensor = commits.memory.setdefault("positions", right)
    return None if torch.equal(captured, right) else captured.expand_as(right)


def _schedules() -> tuple[Fault, ...]:
    def fault(name: str, reference: str, where: str, cause: str, way: Way) -> Fault:
        return Fault(
            name=name,
            mechanism="M03",
            reference=reference,
            where=where,
            sites=_ROTATED,
            cause=cause,
            plant=planted(way),
            applies=needs_rotation,
        )

    def frequency(change: Callable[[Tensor], Tensor]) -> Way:
        return in_attribute(rotaries, frequencies, change)

    return (
        fault(
            "rope_base_x10",
            "huggingface/transformers#27227",
            "The frequency table, computed from ten times the base.",
            "rope_base",
            frequency(partial(_rebased, factor=10.0)),
        ),
        fault(
            "rope_base_x1.01",
            "huggingface/transformers#27227",
            "The frequency table, computed from a base that is 1 % too large.",
            "rope_base",
            frequency(partial(_rebased, factor=1.01)),
        ),
        fault(
            "rope_linear_scaling_of_4",
            "pytorch/torchtitan#4117",
            "The frequency table, divided by a scaling factor of 4 that prefill does not use.",
            "rope_scaling",
            frequency(lambda table: table / 4.0),
        ),
        fault(
            "rope_attention_factor_1.02",
            "vllm-project/vllm#48351",
            "Cosines and sines, multiplied by an attention factor of 1.02.",
            "rope_attention_factor",
            in_outputs(rotaries, lambda module, args, out: tuple(part * 1.02 for part in out)),
        ),
        fault(
            "rope_long_factor_switch",
            "huggingface/transformers#33129",
            f"The frequency table, replaced by the long one from token {_SWITCH + 1} on; cached keys stay.",
            "rope_scaling",
            in_rotation(_switched),
        ),
    )


def _rebased(table: Tensor, factor: float) -> Tensor:
    exponents = torch.arange(len(table), device=table.device, dtype=table.dtype) / len(table)
    return table * factor**-exponents


def _switched(call: Rotation) -> tuple[Tensor, Tensor] | None:
    """Beyond the switch, rotate as a model does whose frequencies are half as high."""
    if call.commits.past + call.commits.q_len <= _SWITCH:
        return None
    return call.rotate(call.q, call.k, *call.tables(call.positions / 2))


def _precision() -> tuple[Fault, ...]:
    def round_trip(tensor: Tensor) -> Tensor:
        return tensor.to(torch.bfloat16).to(tensor.dtype)

    return (
        Fault(
            name="rope_frequencies_bf16",
            mechanism="M04",
            reference="huggingface/transformers#29285",
            where="The frequency table, rounded to bf16 whatever the dtype of the model.",
            sites=_ROTATED,
            cause="rope_frequencies_rounded",
            plant=planted(in_attribute(rotaries, frequencies, round_trip)),
            applies=needs_rotation,
        ),
        Fault(
            name="rope_frequencies_native",
            mechanism="M04",
            reference="huggingface/transformers#29496",
            where="Cosines and sines, computed from angles in the model's own 16-bit dtype.",
            sites=_ROTATED,
            cause="rope_frequencies_rounded",
            plant=planted(in_rotation(_half_angles)),
            dtypes=HALF_DTYPES,
            keyed_to_dtype=True,
            applies=needs_rotation,
        ),
        Fault(
            name="rope_tables_bf16",
            mechanism="M04",
            reference="nkalyanv99/UNI-D2#6",
            where="Cosines and sines, rounded to bf16.",
            sites=_ROTATED,
            cause="rope_tables_rounded",
            plant=planted(in_outputs(rotaries, lambda module, args, out: tuple(round_trip(part) for part in out))),
            dtypes=ABOVE_BF16,
            applies=needs_rotation,
        ),
        Fault(
            name="rope_slowest_pair_lost",
            mechanism="M04",
            reference="huggingface/transformers#48428",
            where="The frequency table, its lowest frequency rounded to 0.",
            sites=_ROTATED,
            cause="rope_pair_lost",
            plant=planted(in_attribute(rotaries, frequencies, _without_last)),
            applies=needs_rotation,
        ),
    )


def _without_last(table: Tensor) -> Tensor:
    lost = table.clone()
    lost[-1] = 0.0
    return lost


def _half_angles(call: Rotation) -> tuple[Tensor, Tensor] | None:
    if not is_half(call.q):
        return None
    table = getattr(call.module, frequencies(call.module)[0]).to(call.q.dtype)
    angle = call.positions.to(call.q.dtype)[..., None] * table
    if call.cos.shape[-1] == 2 * len(table):
        angle = torch.cat([angle, angle], dim=-1)
    factor = getattr(call.module, "attention_scaling", 1.0)  # which scaled tables carry besides their angles
    return call.rotate(call.q, call.k, angle.cos() * factor, angle.sin() * factor)


def _rotations(layer: int) -> tuple[Fault, ...]:
    def fault(
        name: str,
        mechanism: str,
        reference: str,
        where: str,
        cause: str,
        change: Callable[[Rotation], tuple[Tensor, Tensor] | None],
        sites: tuple[Site, ...] = _ROTATED,
    ) -> Fault:
        return Fault(
            name=name,
            mechanism=mechanism,
            reference=reference,
            where=where,
            sites=sites,
            cause=cause,
            plant=planted(in_rotation(change)),
            applies=needs_rotation,
        )

    return (
        fault(
            "k_stored_unrotated",
            "M24",
            "ml-explore/mlx#3494",
            "The new key goes into the cache without rotation.",
            "rope_missing_on_k",
            lambda call: (call.rotated[0], call.k),
            _KEY,
        ),
        fault(
            "k_rotated_twice",
            "M24",
            "ml-explore/mlx#3494",
            "The new key is rotated once more before it goes into the cache.",
            "rope_twice_on_k",
            lambda call: (call.rotated[0], call.rotate(*call.rotated, call.cos, call.sin)[1]),
            _KEY,
        ),
        fault(
            "rope_on_half_of_the_dims",
            "M24",
            "ml-explore/mlx#3494",
            "Only the first half of each head is rotated, as if the model were one of partial rotation.",
            "rope_partial_dims",
            _partial,
        ),
        fault(
            "rope_interleaved",
            "M17",
            "pytorch/pytorch#112577",
            "Pairs of neighbouring dims are rotated instead of pairs from the two halves.",
            "rope_interleaved",
            _interleaved,
        ),
    )


def _turn(call: Rotation, *, only: int, q: int, k: int) -> tuple[Tensor, Tensor] | None:
    if call.layer != only:
        return None
    further = {n: call.rotate(call.q, call.k, *call.tables(call.positions + n)) for n in {q, k}}
    return (further[q][0] if q else call.rotated[0]), (further[k][1] if k else call.rotated[1])


def _partial(call: Rotation) -> tuple[Tensor, Tensor]:
    """Leave the later frequencies unrotated; tables hold each frequency once or, in two halves, twice."""
    dims = call.cos.shape[-1]
    halves = 2 if dims == call.q.shape[-1] or dims > call.q.shape[-1] // 2 else 1
    cos, sin = call.cos.clone(), call.sin.clone()
    for half in range(halves):
        later = slice((2 * half + 1) * dims // (2 * halves), (half + 1) * dims // halves)
        cos[..., later], sin[..., later] = 1.0, 0.0
    return call.rotate(call.q, call.k, cos, sin)


def _interleaved(call: Rotation) -> tuple[Tensor, Tensor]:
    dims = call.q.shape[-1]
    order = [dim for pair in zip(range(dims // 2), range(dims // 2, dims), strict=True) for dim in pair]
    # Dims 2i and 2i + 1 are put where the model's rotation looks for a pair, and back afterwards.
    there = [*range(0, dims, 2), *range(1, dims, 2)]
    q, k = call.rotate(call.q[..., there], call.k[..., there], call.cos, call.sin)
    return q[..., order], k[..., order]
