"""Faults of attention kernels: which kv head a query head reads, and how splits of the keys are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import wraps

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.graph import scores_again, softmax
from kvdrift_bench.planted.llamacpp.attention import SCALE, SOFTCAP, apart, attends
from kvdrift_bench.planted.llamacpp.model import Grounds
from kvdrift_bench.planted.llamacpp.registry import fault
from kvdrift_bench.planted.llamacpp.ways import Change, Spot

_GHOST_MASS = 0.02

Floats = NDArray[np.float64]
# Of each half of the keys: the weighted sum of values [head, dim], the sum of the weights [head, 1].
Parts = list[tuple[Floats, Floats]]
Merge = Callable[[Parts, Floats], Floats]


def _grouped(grounds: Grounds) -> str | None:
    return apart(grounds) or (None if grounds.group > 1 else "each query head has a kv head of its own")


def _mapped(heads: Callable[[int, int], list[int]]) -> Change:
    """Let each query head read the kv head that `heads(query heads, kv heads)` names for it."""

    @wraps(heads)
    def change(spot: Spot) -> Iterator[None]:
        if not (spot.base == "kq" or spot.kind == "values"):
            return
        cache, other = spot.source(0).values()[0].astype(np.float64), spot.source(1).values()[0].astype(np.float64)
        yield
        order = heads(other.shape[0], cache.shape[0])
        # ggml multiplies rows with rows: [head, cell or dim, inner] by [head, token, inner].
        spot.write(other @ cache[order].transpose(0, 2, 1))

    return change


@fault(_grouped)
@_mapped
def heads_tiled(n_heads: int, n_kv: int) -> list[int]:
    return [head % n_kv for head in range(n_heads)]


@fault(_grouped)
@_mapped
def last_head_reads_first_group(n_heads: int, n_kv: int) -> list[int]:
    heads = [head // (n_heads // n_kv) for head in range(n_heads)]
    heads[-1] = 0
    return heads


@fault(_grouped)
@_mapped
def group_of_eight_assumed(n_heads: int, n_kv: int) -> list[int]:
    return [min(head // 8, n_kv - 1) for head in range(n_heads)]


def two_splits(spot: Spot) -> tuple[Parts, Floats]:
    """Return, of each half of the keys, the weighted sum of values [head, dim] and the sum of the weights [head, 1],
    both relative to the softmax of all keys; and the largest score of each half [half, head, 1].

    Only where a node returns the context: `values` or `flash`.
    """
    end = spot.position + 1
    rows = spot.values
    assert rows is not None
    values = rows.read().astype(np.float64)
    if spot.kind == "flash":
        queries, mask = spot.source(0).values()[0].transpose(1, 0, 2), spot.mask
        keys = spot.keys
        assert keys is not None
        cap = spot.node.parameter(SOFTCAP)
        scores = scores_again(queries, keys.read(), spot.node.parameter(SCALE), cap or None)
        scores = scores if mask is None else scores + mask.values()[0, 0, :1, :end].astype(np.float64)
        probs = softmax(scores, spot.node.source(4))[0]
    else:
        probs = spot.source(1).values()[0, :, 0, :end].astype(np.float64)
    wide = np.repeat(values, probs.shape[0] // values.shape[1], axis=1)
    seen = np.flatnonzero((probs > 0).any(axis=0))
    halves = [seen[: len(seen) // 2], seen[len(seen) // 2 :]]
    parts = [
        (np.einsum("hc,chd->hd", probs[:, half], wide[half]), probs[:, half].sum(axis=1, keepdims=True))
        for half in halves
    ]
    with np.errstate(divide="ignore"):
        peaks = np.stack([np.log(probs[:, half].max(axis=1, keepdims=True)) for half in halves])
    return parts, peaks


def in_context(merge: Merge) -> Change:
    """Put what `merge` makes of two splits into the place of the context."""

    @wraps(merge)
    def change(spot: Spot) -> Iterator[None]:
        if spot.kind in ("values", "flash"):
            parts = two_splits(spot)
            yield
            spot.write(merge(*parts))

    return change


def sum_of(arrays: list[Floats]) -> Floats:
    """Return the sum of what splits of the keys yield."""
    return np.asarray(sum(arrays))


@fault(attends)
@in_context
def splits_normalised_apart(parts: Parts, peaks: Floats) -> Floats:
    return sum_of([out / total for out, total in parts])


@fault(attends)
@in_context
def splits_weighted_alike(parts: Parts, peaks: Floats) -> Floats:
    return sum_of([out / total for out, total in parts]) / 2


@fault(attends)
@in_context
def split_peaks_forgotten(parts: Parts, peaks: Floats) -> Floats:
    """Each half is shifted by its own largest score, and added as if they were the same."""
    factors = np.exp(-peaks)
    outs = [out * factor for (out, _), factor in zip(parts, factors, strict=True)]
    totals = [total * factor for (_, total), factor in zip(parts, factors, strict=True)]
    return sum_of(outs) / sum_of(totals)


@fault(attends)
@in_context
def ghost_split(parts: Parts, peaks: Floats) -> Floats:
    return sum_of([out for out, _ in parts]) * (1.0 - _GHOST_MASS)


@fault(attends, name="v_scale_1.001_in_kernel")
@in_context
def v_scale_in_kernel(parts: Parts, peaks: Floats) -> Floats:
    return sum_of([out for out, _ in parts]) * 1.001
