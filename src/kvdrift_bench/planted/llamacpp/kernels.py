"""Faults of attention kernels: which kv head a query head reads, and how splits of the keys are merged."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.graph import scores_again, softmax
from kvdrift.vocabulary.sites import Site
from kvdrift_bench.planted.llamacpp.attention import SCALE, SOFTCAP, apart, attention_fault
from kvdrift_bench.planted.llamacpp.model import Grounds, LlamaFault
from kvdrift_bench.planted.llamacpp.ways import Change, Spot

CONTEXT = (Site.ATTN_CTX, Site.ATTN_OUT)
_GHOST_MASS = 0.02

Floats = NDArray[np.float64]
# Of each half of the keys: the weighted sum of values [head, dim], the sum of the weights [head, 1].
Parts = list[tuple[Floats, Floats]]
Merge = Callable[[Parts, Floats], Floats]


def kernel_faults() -> tuple[LlamaFault, ...]:
    """Return the faults of attention kernels, planted in every layer."""
    return (*_heads(), *_merges())


def _grouped(grounds: Grounds) -> str | None:
    return apart(grounds) or (None if grounds.group > 1 else "each query head has a kv head of its own")


def _mapped(heads: Callable[[int, int], list[int]]) -> Change:
    """Let each query head read the kv head that `heads(query heads, kv heads)` names for it."""

    def change(spot: Spot) -> Iterator[None]:
        if not (spot.base == "kq" or spot.kind == "values"):
            return
        cache, other = spot.source(0).values()[0].astype(np.float64), spot.source(1).values()[0].astype(np.float64)
        yield
        order = heads(other.shape[0], cache.shape[0])
        # ggml multiplies rows with rows: [head, cell or dim, inner] by [head, token, inner].
        spot.write(other @ cache[order].transpose(0, 2, 1))

    return change


def _heads() -> tuple[LlamaFault, ...]:
    def one_wrong(n_heads: int, n_kv: int) -> list[int]:
        heads = [head // (n_heads // n_kv) for head in range(n_heads)]
        heads[-1] = 0
        return heads

    return (
        attention_fault(
            "heads_tiled",
            "M16",
            "ekzhang/jax-js#180",
            "Query head h reads kv head h mod n, in every layer.",
            "heads_tiled",
            _mapped(lambda n_heads, n_kv: [head % n_kv for head in range(n_heads)]),
            applies=_grouped,
        ),
        attention_fault(
            "last_head_reads_first_group",
            "M16",
            "FlashML-org/FreeToken#177",
            "The last query head of every layer reads kv head 0.",
            "head_group_wrong",
            _mapped(one_wrong),
            applies=_grouped,
        ),
        attention_fault(
            "group_of_eight_assumed",
            "M16",
            "ikawrakow/ik_llama.cpp#1521",
            "Query head h reads kv head h div 8, in every layer.",
            "group_size_wrong",
            _mapped(lambda n_heads, n_kv: [min(head // 8, n_kv - 1) for head in range(n_heads)]),
            applies=_grouped,
        ),
    )


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


def context_of(merge: Merge) -> Change:
    """Put what `merge` makes of two splits into the place of the context."""

    def change(spot: Spot) -> Iterator[None]:
        if spot.kind in ("values", "flash"):
            parts = two_splits(spot)
            yield
            spot.write(merge(*parts))

    return change


def sum_of(arrays: list[Floats]) -> Floats:
    """Return the sum of what splits of the keys yield."""
    return np.asarray(sum(arrays))


def _merges() -> tuple[LlamaFault, ...]:
    def apart_each(parts: Parts, peaks: Floats) -> Floats:
        return sum_of([out / total for out, total in parts])

    def alike(parts: Parts, peaks: Floats) -> Floats:
        return apart_each(parts, peaks) / 2

    def peaks_forgotten(parts: Parts, peaks: Floats) -> Floats:
        """Each half is shifted by its own largest score, and added as if they were the same."""
        factors = np.exp(-peaks)
        outs = [out * factor for (out, _), factor in zip(parts, factors, strict=True)]
        totals = [total * factor for (_, total), factor in zip(parts, factors, strict=True)]
        return sum_of(outs) / sum_of(totals)

    def ghost(parts: Parts, peaks: Floats) -> Floats:
        return sum_of([out for out, _ in parts]) * (1.0 - _GHOST_MASS)

    def scaled(parts: Parts, peaks: Floats) -> Floats:
        return sum_of([out for out, _ in parts]) * 1.001

    def fault(
        name: str,
        reference: str,
        where: str,
        merge: Merge,
        *,
        mechanism: str = "M21",
        cause: str = "chunk_merge",
        also: tuple[str, ...] = (),
        amount: float | None = None,
    ) -> LlamaFault:
        return attention_fault(
            name, mechanism, reference, where, cause, context_of(merge), sites=CONTEXT, also=also, amount=amount
        )

    return (
        fault(
            "splits_normalised_apart",
            "AI-Hypercomputer/maxtext#391",
            "Two splits of the keys, each normalised by itself and then added.",
            apart_each,
        ),
        fault(
            "splits_weighted_alike",
            "vllm-project/vllm#26042",
            "Two splits of the keys, merged with equal weights.",
            alike,
        ),
        fault(
            "split_peaks_forgotten",
            "vllm-project/vllm#52909",
            "Two splits of the keys, merged without the difference of their largest scores.",
            peaks_forgotten,
        ),
        fault(
            "ghost_split",
            "sgl-project/sglang#22688",
            "An empty split, merged with a weight of 2 %.",
            ghost,
            cause="ghost_chunk",
            # A weight that goes nowhere and values that are too small give the same context.
            also=("v_scale",),
        ),
        fault(
            "v_scale_1.001_in_kernel",
            "vllm-project/vllm#27232",
            "The output of attention of every layer, 0.1 % too large.",
            scaled,
            mechanism="M19",
            cause="v_scale",
            amount=1e-3,
        ),
    )
