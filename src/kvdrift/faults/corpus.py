"""The corpus: faults that real engines had, re-created at decode only, each with its true first address."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

from torch import Tensor, nn

from kvdrift.faults.model import AttentionArguments, Fault, in_attention, in_cache, in_norms, in_positions
from kvdrift.sites import Site

Plant = Callable[[nn.Module], AbstractContextManager[None]]

# Where a fault inside the attention function shows first: the scores, or the softmax of them.
_SCORES = (Site.ATTN_SCORES, Site.ATTN_PROBS)


def corpus_for(n_layers: int) -> tuple[Fault, ...]:
    """Return the faults for a model of `n_layers` layers; those of one layer are planted two thirds up."""
    layer = (2 * n_layers) // 3
    return (
        Fault(
            name="position_plus_one",
            mechanism="M01",
            reference="Blaizzy/mlx-vlm#1527",
            layer=None,
            # A model of learned positions adds them to the embedding, in front of the first layer.
            sites=(Site.LAYER_IN, Site.Q_ROPE, Site.K_ROPE),
            plant=lambda model: in_positions(model, 1),
        ),
        Fault(
            name="one_layer_scale_1.01",
            mechanism="M18",
            reference="flagos-ai/vllm-plugin-FL#400",
            layer=layer,
            sites=_SCORES,
            plant=_attention(partial(_scale, only=layer, factor=1.01)),
        ),
        Fault(
            name="all_scales_1.001",
            mechanism="M18",
            reference="flagos-ai/vllm-plugin-FL#400",
            layer=None,
            sites=_SCORES,
            plant=_attention(partial(_scale, only=None, factor=1.001)),
        ),
        Fault(
            name="first_key_lost",
            mechanism="M09",
            reference="huggingface/transformers#37574",
            layer=None,
            sites=_SCORES,
            plant=_attention(partial(_lose, first=True)),
        ),
        Fault(
            name="last_key_lost",
            mechanism="M07",
            reference="TrenTorch/TrenTorch#192",
            layer=None,
            sites=_SCORES,
            plant=_attention(partial(_lose, first=False)),
        ),
        Fault(
            name="heads_tiled",
            mechanism="M16",
            reference="ekzhang/jax-js#180",
            layer=None,
            sites=_SCORES,
            plant=_attention(_tile_heads),
        ),
        Fault(
            name="stale_slot",
            mechanism="M11",
            reference="vllm-project/vllm#36580",
            layer=layer,
            sites=(Site.K_CACHE, Site.V_CACHE),
            plant=lambda model: in_cache(partial(_alias_slot, only=layer, slot=5, source=4)),
        ),
        Fault(
            name="norm_epsilon",
            mechanism="M25",
            reference="nntrainer/nntrainer#4318",
            layer=None,
            sites=(Site.ATTN_NORM_OUT, Site.Q_PROJ),
            plant=lambda model: in_norms(model, 0.1),
        ),
    )


def _attention(fault: Callable[..., AttentionArguments]) -> Plant:
    return lambda model: in_attention(model, fault)


def _scale(
    layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, only: int | None, factor: float
) -> AttentionArguments:
    return q, k, v, mask, scale * factor if only in (None, layer) else scale


def _lose(
    layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, *, first: bool
) -> AttentionArguments:
    kept = slice(1, None) if first else slice(None, -1)
    mask = None if mask is None else mask[..., kept]
    return q, k[:, :, kept], v[:, :, kept], mask, scale


def _tile_heads(layer: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float) -> AttentionArguments:
    """Give query head h the kv head h mod n instead of h div group, by putting the queries into that order."""
    heads, kv_heads = q.shape[1], k.shape[1]
    group = heads // kv_heads
    order = [kv + kv_heads * member for kv in range(kv_heads) for member in range(group)]
    return q[:, order], k, v, mask, scale


def _alias_slot(
    layer: int, keys: Tensor, values: Tensor, *, only: int, slot: int, source: int
) -> tuple[Tensor, Tensor]:
    if layer != only or keys.shape[2] <= slot:
        return keys, values
    keys = keys.clone()
    keys[:, :, slot] = keys[:, :, source]
    return keys, values
