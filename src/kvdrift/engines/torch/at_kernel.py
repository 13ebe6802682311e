"""Attention that nothing tells of but the calls of torch: they are recorded, and changed for the positive control."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvdrift.engines.torch.attended import SDPA, OperandPair, by_head, scores_product, values_product, with_copy
from kvdrift.engines.torch.derived import SdpaCall, saw_sdpa
from kvdrift.engines.torch.frames import Frame, Reads
from kvdrift.engines.torch.masks import biases
from kvdrift.engines.torch.scored import scored_by
from kvdrift.vocabulary.facts import AttentionSpec

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

# Products that may make scores are kept up to so many.
_MOST_PRODUCTS = 4


def at_sdpa(frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the kernel, and record what it is called with and what it gives."""
    given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
    query = given["query"]
    if query.ndim != 4 or query.shape[0] != frame.n_rows or frame.kv_len is not None:
        return SDPA(*args, **kwargs)
    reads = frame.on_plant(frame, Reads(query, given["key"], given["value"]))
    frame.on_inputs(frame, reads)
    given |= {"query": reads.query, "key": reads.key, "value": reads.value}
    mask, scale = given.get("attn_mask"), given.get("scale")
    biased = isinstance(mask, Tensor) and mask.is_floating_point() and biases(mask)
    frame.on_spec(frame, AttentionSpec(float(scale or query.shape[-1] ** -0.5), is_biased=biased))
    saw_sdpa(frame, SdpaCall(**given))
    context = SDPA(**given)
    frame.on_context(frame, context.transpose(1, 2))
    return context


def at_product(frame: Frame, func: Any, args: tuple[Any, ...]) -> Any:
    """Call a product, and record it if it is one of queries and keys, or of probabilities and values.

    Which product makes the scores is known when they go through a softmax; the positive control is planted before.
    """
    if frame.scored is not None:
        found = values_product(func, args, frame.n_rows, frame.q_len, frame.scored.pair.right.shape[2])
        if found is None:
            return func(*args)
        reads = frame.on_plant(frame, Reads(value=found.right))
        frame.on_inputs(frame, reads)
        value = reads.value
        if value is not found.right and value is not None:
            args = with_copy(func, args, 1)
            written = values_product(func, args, frame.n_rows, frame.q_len, value.shape[2])
            assert written is not None
            written.right.copy_(value)
        out = func(*args)
        context = by_head(out, found)
        if context is not None:
            frame.on_context(frame, context)
        frame.scored = None
        frame.products.clear()
        return out
    found = scores_product(func, args, frame.n_rows, frame.q_len)
    if found is None:
        return func(*args)
    planted = frame.on_plant(frame, Reads(found.left, found.right))
    for index, (before, after) in enumerate(((found.left, planted.query), (found.right, planted.key))):
        if after is not None and after is not before:
            args = with_copy(func, args, index)
            written = scores_product(func, args, frame.n_rows, frame.q_len)
            assert written is not None
            (written.left, written.right)[index].copy_(after)
    is_whole = planted.query is not None and planted.key is not None
    frame.products.append(OperandPair(planted.query, planted.key) if is_whole else found)  # type: ignore[arg-type]
    del frame.products[:-_MOST_PRODUCTS]
    return func(*args)


def at_softmax(frame: Frame, scores: Tensor) -> None:
    """Record the queries and keys whose product went into a softmax, and how they were scored on the way."""
    if frame.kv_len is not None or frame.scored is not None or not frame.products or scores.ndim < 3:
        return
    with torch._C.DisableTorchFunction():
        frame.scored = scored = scored_by(frame.products, scores)
    if scored is None:
        return
    frame.on_inputs(frame, Reads(scored.pair.left, scored.pair.right))
    has_sink = scores.shape[-1] > scored.pair.right.shape[2]
    if scored.scale is not None and (scored.sinks is not None or not has_sink):
        frame.on_spec(frame, AttentionSpec(scored.scale, sinks=scored.sinks))
