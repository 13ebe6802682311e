"""Which products of a call of attention make the scores that its softmax gets.

Scores may be the product of queries and keys, or the sum of two of them: of a part with position and one without, as
where latent keys are attended to without being expanded (DeepSeek-V2, arXiv 2405.04434, section 2.1), or of keys and
relative positions. A sum of products is the product of their operands side by side. A softmax may also get one column
more than there are keys: that of a sink.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from kvdrift.engines.torch.attended import OperandPair, is_readable
from kvdrift.engines.torch.masks import least_score

# Roundings of a score, of the sum of its squared terms: a scale that explains it leaves no more.
_ALIKE = 8.0


@dataclass(frozen=True, slots=True)
class Scored:
    """What a softmax weighs.

    Attributes:
        pair: queries and keys, whose product the scores follow.
        keys: the columns of the scores that belong to keys.
        scale: by what their product was multiplied, None if it is no usual factor or if more was done to it.
        sinks: [head], the score of the column that belongs to no key, on the same scale; None without such a column, or
            if it is not the same for all tokens.
    """

    pair: OperandPair
    keys: slice
    scale: float | None
    sinks: tuple[float, ...] | None = None


def scored_by(products: Sequence[OperandPair], scores: Tensor) -> Scored | None:
    """Return which of the products that were seen, latest first, or which of their sums, makes `scores` [..., token,
    column], or which of them stand in it side by side; None if none has as many keys.

    Of several the one counts that leaves least of the scores once a factor and a constant of each row were fitted:
    scores may be capped or biased as well. Scores that are none of several products of one query, such as those of keys
    with and without their rounding, may be a mixture of them, and none is returned. Nor can the score of a single key
    be fitted: its latest product is believed.
    """
    best: tuple[float, Scored] | None = None
    # All products that are given are read along one axis.
    columns = scores.shape[-1 - any(pair.is_flipped for pair in products)]
    if columns == 1:
        single = next((pair for pair in reversed(products) if pair.right.shape[2] == 1), None)
        return None if single is None or single.arranged(scores) is None else Scored(single, slice(0, 1), None)
    pairs = [*_sums(products), *_rows_of_pieces(products, columns)]
    # A column beside the keys is a sink's if no product makes it.
    for beside in (0, 1):
        for pair in (pair for pair in pairs if pair.right.shape[2] == columns - beside):
            for keys in (slice(0, columns - beside), slice(beside, columns))[: beside + 1]:
                found = _fitted(pair, scores, keys)
                if found is not None and (best is None or found[0] < best[0]):
                    best = found
        if best is not None and best[1].scale is not None:
            return best[1]
    if best is None or (best[1].scale is None and _are_alternatives(products)):
        return None
    return best[1]


def _are_alternatives(products: Sequence[OperandPair]) -> bool:
    """Whether one query was multiplied with different keys of the same number."""
    return any(
        _way(one) == _way(other)
        and one.left.shape == other.left.shape
        and one.right.shape == other.right.shape
        and torch.equal(one.left, other.left)
        and not torch.equal(one.right, other.right)
        for one, other in combinations(products, 2)
    )


def _sums(products: Sequence[OperandPair]) -> Iterator[OperandPair]:
    """Every product alone, then every sum of two and three of them."""
    latest = [*reversed(products)]
    yield from latest
    for count in (2, 3):
        for parts in combinations(latest, count):
            ways = {(part.left.shape[:3], part.right.shape[2], *_way(part)) for part in parts}
            if len(ways) == 1:
                heads = max(part.right.shape[1] for part in parts)
                if all(heads % part.right.shape[1] == 0 for part in parts):
                    right = [part.right.repeat_interleave(heads // part.right.shape[1], dim=1) for part in parts]
                    left = torch.cat([part.left for part in parts], -1)
                    yield replace(parts[0], left=left, right=torch.cat(right, -1))


def _rows_of_pieces(products: Sequence[OperandPair], columns: int) -> Iterator[OperandPair]:
    """Products of one query with keys in pieces, such as those of a cache that keeps its latest keys apart, whose keys
    are as many as there are columns, or one less."""
    for last in range(len(products), 1, -1):
        for first in range(last - 2, -1, -1):
            parts = products[first:last]
            if sum(part.right.shape[2] for part in parts) not in (columns, columns - 1):
                continue
            if len({(part.right.shape[1], part.right.shape[3], *_way(part)) for part in parts}) > 1:
                continue
            if all(torch.equal(part.left, parts[0].left) for part in parts[1:]):
                yield replace(parts[0], right=torch.cat([part.right for part in parts], dim=2))


def _way(pair: OperandPair) -> tuple[object, ...]:
    """How what a product gives is read."""
    return pair.order, pair.group, pair.tokens_first, pair.is_flipped


def _fitted(pair: OperandPair, scores: Tensor, keys: slice) -> tuple[float, Scored] | None:
    """The share of the scores that this product leaves over, up to rounding, and what it says; None if the shapes do
    not fit or no row has two visible keys."""
    query, key = pair.left.double(), pair.right.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    raw = query @ key.mT
    all_seen = pair.arranged(scores.double())
    if all_seen is None:
        return None
    seen = all_seen[..., keys]
    visible = seen > least_score(scores.dtype)
    if not is_readable(pair, visible):
        return None
    count = visible.sum(-1, keepdim=True).clamp(min=1)

    def centred(values: Tensor) -> Tensor:
        values = torch.where(visible, values, 0.0)
        return torch.where(visible, values - values.sum(-1, keepdim=True) / count, 0.0)

    of_raw, of_seen = centred(raw), centred(seen)
    along, total = float((of_raw * of_raw).sum()), float((of_seen * of_seen).sum())
    if not along > 0.0 or not total > 0.0:
        return None
    factor = float((of_raw * of_seen).sum()) / along
    left = float(((of_seen - factor * of_raw) ** 2).sum()) / total
    size = torch.linalg.vector_norm(query, dim=-1)[..., None] * torch.linalg.vector_norm(key, dim=-1)[..., None, :]
    dim = query.shape[-1]
    for scale in (dim**-0.5, 1.0, 1.0 / dim):
        room = 2.0 * _ALIKE * torch.finfo(scores.dtype).eps * scale * size.amax(-1, keepdim=True)
        if bool(((of_seen - scale * of_raw).abs() <= room).all()):
            return left, Scored(pair, keys, scale, _sinks(all_seen, seen - scale * raw, visible, keys, room))
    return left, Scored(pair, keys, None)


def _sinks(all_seen: Tensor, shift: Tensor, visible: Tensor, keys: slice, room: Tensor) -> tuple[float, ...] | None:
    """What the column beside the keys holds, less what was added to all scores of a row."""
    columns = all_seen.shape[-1]
    if columns == len(range(*keys.indices(columns))):
        return None
    of_row = torch.where(visible, shift, 0.0).sum(-1) / visible.sum(-1).clamp(min=1)
    column = all_seen[..., columns - 1 if keys.start == 0 else 0] - of_row
    first = column[:1, :, :1]
    if not bool(((column - first).abs() <= room[..., 0] + 1e-6 * first.abs()).all()):
        return None
    return tuple(float(value) for value in column[0, :, -1])


__all__ = ["Scored", "scored_by"]
