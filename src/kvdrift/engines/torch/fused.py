"""Values in what one projection makes: how it holds queries, keys and values, and which keys are read beside them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from kvdrift.vocabulary.sites import Site

Pick = Callable[[Tensor], Tensor]  # cuts a site's part out of a tensor [..., n], for fused projections


def of_groups(value: Tensor) -> Tensor:
    """Return the values [1, head, token, dim] of every kv head once, where they were repeated for a group of heads."""
    heads = value.shape[1]
    for size in range(heads, 1, -1):
        if heads % size == 0:
            groups = value.reshape(1, heads // size, size, *value.shape[2:])
            if torch.equal(groups, groups[:, :, :1].expand_as(groups)):
                distinct: Tensor = groups[:, :, 0]
                return distinct
    return value


def keys_in_front(read: Tensor | None, made: Tensor, n_tokens: int) -> int:
    """Return how many keys that belong to no token stand in front of those of the tokens, in a first call.

    `read` [1, kv head, key, dim] are the values that attention reads, `made` those of the tokens, in any shape whose
    first axis longer than 1 counts tokens. Learned keys and values stand there, and have been made by no projection.
    """
    n_others = 0 if read is None else read.shape[2] - n_tokens
    if read is None or n_others <= 0:
        return 0
    wanted = made.reshape(n_tokens, -1) if made.numel() % n_tokens == 0 else made

    def is_at(start: int) -> bool:
        rows = of_groups(read[:, :, start : start + n_tokens])[0].transpose(0, 1).reshape(n_tokens, -1)
        return rows.shape == wanted.shape and torch.equal(rows, wanted)

    return n_others if is_at(n_others) and not is_at(0) else 0


def blocks(heads: int, kv_heads: int, dim: int) -> dict[Site, Pick]:
    """All queries, then all keys, then all values (GPT-2, Phi-3)."""
    q, k = heads * dim, kv_heads * dim
    return {
        Site.Q_PROJ: lambda out: out[..., :q],
        Site.K_PROJ: lambda out: out[..., q : q + k],
        Site.V_PROJ: lambda out: out[..., q + k : q + 2 * k],
    }


def grouped(heads: int, kv_heads: int, dim: int) -> dict[Site, Pick]:
    """Per kv head: its queries, its key, its value (GPT-NeoX, BLOOM, Falcon)."""
    per_group = heads // kv_heads

    def part(first: int, last: int) -> Pick:
        def pick(out: Tensor) -> Tensor:
            groups = out.reshape(*out.shape[:-1], kv_heads, per_group + 2, dim)
            return groups[..., first:last, :].reshape(*out.shape[:-1], -1)

        return pick

    return {
        Site.Q_PROJ: part(0, per_group),
        Site.K_PROJ: part(per_group, per_group + 1),
        Site.V_PROJ: part(per_group + 1, per_group + 2),
    }
