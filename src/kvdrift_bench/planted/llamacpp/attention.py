"""Faults inside attention: how it is scored, and over which keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np
from numpy.typing import NDArray

from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.registry import fault, faults
from kvdrift_bench.planted.llamacpp.ways import Change, Spot, in_one_layer, lend_factor

SCALE, SOFTCAP = 0, 2  # ggml.c: parameters of SOFT_MAX and FLASH_ATTN_EXT

# From this position on the first tokens have left the windows of tiny models.
FAR = 12

Mask = NDArray[np.float32]
Cells = NDArray[np.int64]


# ------------------------------------------------------------------------------------------- what a file must have


def attends(grounds: Grounds) -> str | None:
    """Whether there are keys to attend to."""
    return None if grounds.full or grounds.sliding else "no attention"


def apart(grounds: Grounds) -> str | None:
    """Whether scores, softmax and the sum over values are operations of their own."""
    return "attention is one operation" if grounds.flash else attends(grounds)


def first_full(grounds: Grounds) -> int:
    """The first layer that sees all keys."""
    return min(grounds.full, default=0)


def _first_sliding(grounds: Grounds) -> int:
    return min(grounds.sliding)


def _first_full_behind_sliding(grounds: Grounds) -> int:
    """The first layer that is told what a window is: one behind a layer that has one, in the first step."""
    return min(layer for layer in grounds.full if layer > min(grounds.sliding))


def _uncapped(grounds: Grounds) -> str | None:
    return "scores are capped" if grounds.capped else attends(grounds)


def _apart_and_uncapped(grounds: Grounds) -> str | None:
    return apart(grounds) or _uncapped(grounds)


def _capped(grounds: Grounds) -> str | None:
    return None if grounds.capped else "no soft cap on the scores"


def _has_sinks(grounds: Grounds) -> str | None:
    return None if grounds.sinks else "no attention sinks"


def _apart_with_sinks(grounds: Grounds) -> str | None:
    return apart(grounds) or _has_sinks(grounds)


def _has_window(grounds: Grounds) -> str | None:
    return None if grounds.sliding else "no sliding window"


def _mixed(grounds: Grounds) -> str | None:
    return None if grounds.sliding and grounds.full else "no sliding window beside full attention"


# ------------------------------------------------------------------------------------------------- scale, cap and sinks


def _scaled(spot: Spot, factor: float) -> Iterator[None]:
    if spot.kind in ("softmax", "flash"):
        lend_factor(spot, SCALE, factor)
        yield


@faults({"all_scales_1.001": 1.001, "all_scales_1.0001": 1.0001}, _uncapped)
def all_scales(factor: float) -> Change:
    return lambda spot: _scaled(spot, factor)


@fault(_uncapped, name="one_layer_scale_1.01")
@in_one_layer
def one_layer_scale(spot: Spot) -> Iterator[None]:
    yield from _scaled(spot, 1.01)


@fault(_apart_and_uncapped, name="one_head_scale_1.016")
@in_one_layer
def one_head_scale(spot: Spot) -> Iterator[None]:
    if spot.base == "kq" and spot.kind == "scores":
        yield
        scores = spot.node.values().copy()
        scores[0, 1] *= 1.0 + 2**-6
        spot.write(scores)


@fault(_capped)
def softcap_missing(spot: Spot) -> Iterator[None]:
    if spot.kind == "flash":
        spot.lend_parameter(SOFTCAP, 0.0)
        yield
    elif spot.base == "kq_tanh":
        before = spot.source(0).values().copy()
        yield
        spot.write(before)


@fault(_capped)
def softcap_too_small(spot: Spot) -> Iterator[None]:
    if spot.kind == "flash":
        lend_factor(spot, SOFTCAP, 0.5)
        yield
    elif spot.base in ("kq_scaled_1", "kq_scaled_2"):
        lend_factor(spot, 0, 2.0 if spot.base == "kq_scaled_1" else 0.5)
        yield


@fault(_has_sinks)
def sink_missing(spot: Spot) -> Iterator[None]:
    if spot.kind in ("softmax", "flash"):
        spot.lend_operand(2 if spot.kind == "softmax" else 4, None)
        yield


@fault(_apart_with_sinks)
def sink_doubled(spot: Spot) -> Iterator[None]:
    """With a sink of probability s = 1 - sum_j p_j counted once more, each p_j is divided by 1 + s."""
    if spot.kind == "softmax":
        yield
        probs = spot.node.values().astype(np.float64)
        spot.write(probs / (2.0 - probs.sum(axis=-1, keepdims=True)))


# ------------------------------------------------------------------------------------------------- which keys are seen


def masked(change: Callable[[Spot, Mask], None]) -> Change:
    """Change the row [cell] of the mask that the step sees: 0 where a key is seen, -inf where it is hidden."""

    @wraps(change)
    def around(spot: Spot) -> Iterator[None]:
        mask = spot.mask
        if mask is not None:
            rows = mask.values().astype(np.float32)
            change(spot, rows[0, 0, 0])
            spot.lend(mask, rows)
            yield

    return around


def _seen(row: Mask) -> Cells:
    return np.flatnonzero(row == 0)


def hiding(choose: Callable[[Cells], Cells]) -> Change:
    """Hide some of the cells that are seen."""

    @wraps(choose)
    def change(spot: Spot, row: Mask) -> None:
        row[choose(_seen(row))] = -np.inf

    return masked(change)


@fault(attends)
@hiding
def first_key_lost(seen: Cells) -> Cells:
    return seen[:1]


@fault(attends)
@hiding
def last_key_lost(seen: Cells) -> Cells:
    return seen[-1:]


@fault(attends)
@in_one_layer
@hiding
def last_key_lost_in_one_layer(seen: Cells) -> Cells:
    return seen[-1:]


@fault(attends)
@hiding
def some_key_lost(seen: Cells) -> Cells:
    return seen[len(seen) // 3 : len(seen) // 3 + 1]


@fault(attends)
@hiding
def mask_top_left(seen: Cells) -> Cells:
    return seen[1:]


@fault(attends)
@hiding
def last_tile_dropped(seen: Cells) -> Cells:
    return seen[-4:]


@fault(attends)
@masked
def unwritten_slots_read(spot: Spot, row: Mask) -> None:
    row[spot.position + 1 : spot.position + 3] = 0.0


@fault(attends, first=first_full)
@masked
def graph_kv_len_frozen(spot: Spot, row: Mask) -> None:
    if spot.position >= FAR and len(_seen(row)) > spot.position:  # a window moves on with its tokens
        captured = spot.tally.memory.setdefault("kv_len", spot.position + 1)
        row[captured : spot.position + 1] = -np.inf


def _is_full(spot: Spot, row: Mask) -> bool:
    """Whether a window hides some of the keys."""
    return len(_seen(row)) < spot.position + 1


@fault(_has_window, first=_first_sliding)
@masked
def window_minus_one(spot: Spot, row: Mask) -> None:
    if _is_full(spot, row):
        row[_seen(row)[0]] = -np.inf


@fault(_has_window, first=_first_sliding)
@masked
def window_plus_one(spot: Spot, row: Mask) -> None:
    if _is_full(spot, row):
        row[_seen(row)[0] - 1] = 0.0


@fault(_mixed, first=_first_full_behind_sliding)
@masked
def window_on_every_layer(spot: Spot, row: Mask) -> None:
    """What the last layer with a window saw, every other layer sees as well."""
    known = spot.tally.memory
    if _is_full(spot, row):
        known["window"] = len(_seen(row))
    elif "window" in known:
        row[_seen(row)[: -known["window"]]] = -np.inf
