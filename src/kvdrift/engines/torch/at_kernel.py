"""Attention that nothing tells of but the calls of torch: they are recorded, and changed for the positive control.

A module may attend in one call or in several: block by block of its keys, or with two maps of attention. Therefore
nothing is recorded before the module has returned. Calls with one query over keys in pieces are one attention over all
of them; of calls with several queries nothing is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import msgspec
import torch
from torch import Tensor

from kvdrift.engines.torch.attended import (
    SDPA,
    OperandPair,
    along,
    packed_pair,
    rows_of_padding,
    scores_product,
    takes_weights,
    values_product,
    with_written,
)
from kvdrift.engines.torch.derived import SdpaCall, saw_sdpa
from kvdrift.engines.torch.frames import Frame, KernelCall, Reads, ScoreRows
from kvdrift.engines.torch.masks import biases
from kvdrift.engines.torch.scored import scored_by
from kvdrift.engines.torch.shown import ShownKernel, causal_mask, scale_of
from kvdrift.vocabulary.facts import AttentionSpec

_SDPA_ARGUMENTS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

# Products that may make scores are kept up to so many.
_MOST_PRODUCTS = 8
# The place of the kernel of torch among what makes scores: no product.
_KERNEL = -1


def at_sdpa(frame: Frame, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the kernel, and keep what it is called with and what it gives."""
    given = dict(zip(_SDPA_ARGUMENTS, args, strict=False)) | kwargs
    operands: list[Tensor] = [given[name] for name in _SDPA_ARGUMENTS[:3]]
    is_flat = frame.n_rows == 1 and all(each.ndim == 3 for each in operands)  # heads of the one row, and no axis for it
    if is_flat:
        operands = [each[None] for each in operands]
    query, key, value = operands
    if query.ndim != 4 or query.shape[0] != frame.n_rows:
        return SDPA(*args, **kwargs)
    frame.made_scores.add(_KERNEL)
    reads = frame.on_plant(frame, Reads(query, key, value))
    called = given | {"query": reads.query, "key": reads.key, "value": reads.value}
    mask, scale = given.get("attn_mask"), given.get("scale")
    biased = isinstance(mask, Tensor) and mask.is_floating_point() and biases(mask)
    n_seen = len(frame.seen)
    pair, of_tokens = _of_tokens(frame, called)
    saw_sdpa(frame, SdpaCall(**of_tokens))
    rows = frame.seen.pop() if len(frame.seen) > n_seen else None
    part = KernelCall(
        _kept(frame, Reads(pair.left, reads.key, reads.value)),
        AttentionSpec(float(scale or query.shape[-1] ** -0.5), is_biased=biased),
        rows,
    )
    frame.parts.append(part)
    if is_flat:
        called |= {name: called[name][0] for name in _SDPA_ARGUMENTS[:3]}
    out: Tensor = SDPA(**called)
    with torch._C.DisableTorchFunction():
        context = pair.arranged(out)
        part.context = None if context is None else context.transpose(1, 2)
    return out


def at_shown(frame: Frame, func: ShownKernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Call a kernel of the model's own that shows its operands, and keep what it is called with and what it gives."""
    query, key, value = args[:3]
    if not all(each.ndim == 4 and each.shape[0] == frame.n_rows for each in (query, key, value)):
        return func.kernel(*args, **kwargs)
    reads = frame.on_plant(frame, Reads(query, key, value))
    assert reads.query is not None
    assert reads.key is not None
    scale, n_seen = scale_of(query, kwargs), len(frame.seen)
    frame.kernel = frame.kernel or func.__name__
    with torch._C.DisableTorchFunction():
        saw_sdpa(frame, SdpaCall(reads.query, reads.key, value, causal_mask(query, key), scale=scale))
        rows = frame.seen.pop() if len(frame.seen) > n_seen else None
        part = KernelCall(_kept(frame, reads), AttentionSpec(scale), rows)
    frame.parts.append(part)
    out = func.kernel(reads.query, reads.key, reads.value, *args[3:], **kwargs)
    part.context = out.transpose(1, 2)
    return out


def _of_tokens(frame: Frame, given: dict[str, Any]) -> tuple[OperandPair, dict[str, Any]]:
    """The queries of a call by head and token, and its arguments with them: without rows of zeros that fill a tile
    behind the tokens, and with the query heads that stand in the axis of tokens in their own."""
    query, key = given["query"], given["key"]
    mask: Any = given.get("attn_mask")
    as_given = OperandPair(query, key)
    if query.shape[2] == frame.q_len or given.get("is_causal") or not frame.lanes:
        return as_given, given
    with torch._C.DisableTorchFunction():
        padding, has_rows = rows_of_padding(query, frame.q_len), isinstance(mask, Tensor) and mask.ndim >= 2
        if padding:
            pair = replace(as_given, left=query[:, :, : frame.q_len], padding=padding)
            if has_rows and mask.shape[-2] == query.shape[2]:
                mask = mask[..., : frame.q_len, :]
            return pair, given | {"query": pair.left, "attn_mask": mask}
        found = packed_pair(query, key, mask if has_rows else None, frame.q_len, frame.n_heads)
        if found is None:
            return as_given, given
        if has_rows and mask.shape[-2] == query.shape[2]:
            whole = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            mask = found.unpacked(whole.expand(whole.shape[0], key.shape[1], *whole.shape[2:]))
        return found, given | {"query": found.left, "attn_mask": mask, "enable_gqa": True}


def at_product(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a product, and keep it if it is one of queries and keys, or of probabilities and values.

    Which product makes the scores is known when they go through a softmax; the positive control is planted before. It
    is left out of products that made none in a call like this: those of an adapter have such operands too.
    """
    if frame.scored is not None:
        return _of_values(frame, func, args, kwargs)

    def find(given: tuple[Any, ...], is_flipped: bool) -> OperandPair | None:
        return scores_product(func, given, kwargs, frame.n_rows, frame.q_len, is_flipped=is_flipped)

    ways = _ways(frame, [found for found in (find(args, False), find(args, True)) if found is not None])
    if not ways:
        return func(*args, **kwargs)
    found, is_flipped = ways[0], ways[0].is_flipped
    place, frame.n_products = frame.n_products, frame.n_products + 1
    reads = Reads(found.left, found.right)
    is_other = bool(frame.made_scores) and place not in frame.made_scores
    planted = reads if is_other else frame.on_plant(frame, reads)
    for index, (before, after) in enumerate(((found.left, planted.query), (found.right, planted.key))):
        if after is not None and after is not before:
            args = with_written(func, args, index, partial(find, is_flipped=is_flipped), after, is_flipped=is_flipped)
    for way in ways:
        pair = find(args, way.is_flipped)
        assert pair is not None
        frame.products += replace(pair, place=place).readings(frame.q_len)
    del frame.products[:-_MOST_PRODUCTS]
    return func(*args, **kwargs)


def _ways(frame: Frame, found: list[OperandPair]) -> list[OperandPair]:
    """The ways in which a product may be one of queries and keys: those with the heads that a token has, where one has
    them; else all. The softmax says which one it is."""

    def n_heads(pair: OperandPair) -> int:
        return pair.left.shape[1] * pair.left.shape[2] // frame.q_len

    return [pair for pair in found if n_heads(pair) == frame.n_heads] or found


def _of_values(frame: Frame, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a product behind a softmax, and keep it if it takes values with these weights."""
    scored = frame.scored
    assert scored is not None

    def find(given: tuple[Any, ...], is_flipped: bool) -> OperandPair | None:
        return values_product(func, given, kwargs, frame.n_rows, scored.pair, is_flipped=is_flipped)

    ways = (find(args, is_flipped) for is_flipped in (False, True))
    found = next((each for each in ways if each is not None and _takes_weights(frame, each)), None)
    if found is None:
        return func(*args, **kwargs)
    planted = frame.on_plant(frame, Reads(value=found.right)).value
    if planted is not None and planted is not found.right:
        is_flipped = found.is_flipped
        args = with_written(func, args, 1, partial(find, is_flipped=is_flipped), planted, is_flipped=is_flipped)
        found = find(args, is_flipped)
        assert found is not None
    out = func(*args, **kwargs)
    frame.weighed.append(found.right)
    n_keys = sum(value.shape[2] for value in frame.weighed)
    if n_keys < scored.pair.right.shape[2]:
        return out
    part = _scored_part(frame)
    if n_keys > scored.pair.right.shape[2]:
        part.reads.value = None  # other values than those of the keys, one after the other
    elif len(frame.weighed) == 1:
        context = found.arranged(out)
        part.context = None if context is None else context.transpose(1, 2)
        part.spec = part.spec if _are_weights(frame, found.left) else _biased(part.spec)
    frame.parts.append(part)
    frame.scored, frame.weights, frame.softmaxes = None, None, []
    frame.weighed.clear()
    frame.products.clear()
    return out


def _takes_weights(frame: Frame, found: OperandPair) -> bool:
    scored = frame.scored
    assert scored is not None
    first = sum(value.shape[2] for value in frame.weighed)
    taken = slice(first, first + found.right.shape[2])
    with torch._C.DisableTorchFunction():
        weights = [each[..., scored.keys][..., taken] for each in frame.softmaxes]
        return takes_weights(found, scored.pair.left, weights)


def _are_weights(frame: Frame, left: Tensor) -> bool:
    """Whether the values are taken with what the softmax gave, and with nothing that was made of it."""
    weights = frame.weights
    if weights is None or frame.scored is None or weights[..., frame.scored.keys].shape != left.shape:
        return False
    return torch.equal(weights[..., frame.scored.keys].to(left.dtype), left)


def _biased(spec: AttentionSpec | None) -> AttentionSpec | None:
    return None if spec is None else msgspec.structs.replace(spec, is_biased=True)


def at_softmax(frame: Frame, scores: Tensor, probs: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Find the queries and keys whose product went into a softmax along an axis, and how they were scored on the way;
    return what went in and came out, as [row, head, token, key] if they were found."""
    if frame.scored is not None:
        with torch._C.DisableTorchFunction():
            further = frame.scored.pair.arranged(probs)
        frame.softmaxes += [] if further is None else [further]
        return scores, probs
    products = along(frame.products, scores, axis)
    if not products or scores.ndim < 2:
        return scores, probs
    with torch._C.DisableTorchFunction():
        found = scored_by(products, scores)
        if found is None:
            frame.is_unclear = True
            return scores, probs
        frame.seen.clear()  # of this softmax alone is known what it weighs
        # Keys in pieces are several products of one query.
        query = found.pair.left
        alike = (each for each in frame.products if each.left.dtype == query.dtype)
        frame.made_scores |= {each.place for each in alike if torch.equal(each.left, query)}
        frame.scored, frame.weights = found, found.pair.arranged(probs)
        frame.softmaxes = [] if frame.weights is None else [frame.weights]
        arranged = found.pair.arranged(scores)
    if arranged is None or frame.weights is None:
        return scores, probs
    return arranged, frame.weights


def _scored_part(frame: Frame) -> KernelCall:
    """The attention call whose softmax was seen, with the values that were taken so far."""
    scored = frame.scored
    assert scored is not None
    has_sink = frame.weights is not None and frame.weights.shape[-1] > scored.pair.right.shape[2]
    spec = None
    if scored.scale is not None and (scored.sinks is not None or not has_sink):
        spec = AttentionSpec(scored.scale, sinks=scored.sinks)
    value = _joined(frame.weighed)
    rows = frame.seen.pop() if frame.seen else None
    return KernelCall(_kept(frame, Reads(scored.pair.left, scored.pair.right, value)), spec, rows)


def flush(frame: Frame) -> None:
    """Record what was seen of attention while its module ran."""
    if frame.is_unclear:
        frame.seen.clear()
        return
    with torch._C.DisableTorchFunction():
        if frame.scored is not None and not frame.parts:
            frame.weighed.clear()
            frame.parts.append(_scored_part(frame))
        part = _as_one(frame, frame.parts)
    if part is None:
        return
    frame.seen = [] if part.rows is None else [part.rows]
    frame.on_inputs(frame, part.reads)
    if part.spec is not None:
        frame.on_spec(frame, part.spec)
    if part.context is not None:
        frame.on_context(frame, part.context)


def _as_one(frame: Frame, parts: list[KernelCall]) -> KernelCall | None:
    """One attention over all keys of calls with one query, None if there is no call or if their queries differ."""
    if len(parts) < 2:
        return parts[0] if parts else None
    if (whole := _by_heads(frame, parts)) is not None:
        return whole
    first = parts[0]
    query, context = first.reads.query, first.context
    is_one = query is not None and all(
        part.reads.query is not None and torch.equal(part.reads.query, query) for part in parts[1:]
    )
    pieces = [part.reads.key for part in parts]
    keys, values = _joined(pieces), _joined([part.reads.value for part in parts])
    if not is_one or keys is None or values is None or context is None:
        frame.seen.clear()
        return None
    specs = {part.spec for part, key in zip(parts, pieces, strict=True) if key is None or key.shape[2] > 1}
    found = [part.rows for part in parts if part.rows is not None]
    rows = None
    if len(found) == len(parts):
        scores = torch.cat([each.scores.double() for each in found], -1)
        rows = ScoreRows(scores.to(frame.wide), torch.softmax(scores, -1).to(frame.wide), measured=False)
    return KernelCall(Reads(query, keys, values), specs.pop() if len(specs) == 1 else None, rows)


def _by_heads(frame: Frame, parts: list[KernelCall]) -> KernelCall | None:
    """One attention of calls that have some of the heads each, in their order, and all keys; None if they have not."""
    reads, contexts = [part.reads for part in parts], [part.context for part in parts]
    sides = [[getattr(each, name) for each in reads] for name in ("query", "key", "value")]
    if any(each is None for side in (*sides, contexts) for each in side):
        return None
    queries, keys, _ = sides
    groups = {query.shape[1] / key.shape[1] for query, key in zip(queries, keys, strict=True)}
    if sum(query.shape[1] for query in queries) != frame.n_heads or len(groups) > 1:
        return None
    if any(len({(side[0].shape[0], *each.shape[2:]) for each in side}) > 1 for side in sides):
        return None
    found = [part.rows for part in parts if part.rows is not None]
    rows = None
    if len(found) == len(parts):
        scores, probs = (torch.cat([getattr(each, name) for each in found], 1) for name in ("scores", "probs"))
        rows = ScoreRows(scores, probs, measured=all(each.measured for each in found))
    specs = {part.spec for part in parts}
    return KernelCall(
        Reads(*(torch.cat(side, 1) for side in sides)),
        specs.pop() if len(specs) == 1 else None,
        rows,
        torch.cat([each for each in contexts if each is not None], 2),
    )


def _joined(pieces: Sequence[Tensor | None]) -> Tensor | None:
    """Rows [row, kv head, key, dim] one after the other, None if one is missing or has other heads."""
    found = [piece for piece in pieces if piece is not None]
    if len(found) < len(pieces) or not found or len({(*p.shape[:2], p.shape[3]) for p in found}) > 1:
        return None
    return found[0] if len(found) == 1 else torch.cat(found, dim=2)


def _kept(frame: Frame, reads: Reads) -> Reads:
    """Copies of what is recorded later: a module may write over it before it returns."""
    if not frame.lanes:
        return reads
    with torch._C.DisableTorchFunction():
        return Reads(*(None if each is None else each.clone() for each in (reads.query, reads.key, reads.value)))


__all__ = ["at_product", "at_sdpa", "at_shown", "at_softmax", "flush"]
