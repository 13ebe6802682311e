"""A tiny decoder of nobody's framework, whose attention, feed-forward part and layout a test may write itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift
from kvdrift.pipeline.audit import Audit

WIDTH, HEADS, KV_HEADS, DIM = 32, 4, 2, 8
SCALE = DIM**-0.5
PROMPTS = {"p": [5, 9, 17, 3, 44, 2, 8, 31, 60, 12, 33], "q": [7, 1, 40, 22, 13, 14, 15, 60, 61, 62, 11, 3, 55, 43]}

# core(query, keys, values, start, decoding): query [1, head, token, dim], keys and values [1, kv head, key, dim], all
# keys of the cache and the new ones; gives [1, head, token, dim]
Core = Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]
# behind(context [1, token, features], inputs of the attention module, decoding)
Behind = Callable[[Tensor, Tensor, bool], Tensor]


def causal(query: Tensor, keys: Tensor, start: int) -> Tensor:
    """Which keys each token sees, [token, key]."""
    tokens, n_keys = query.shape[2], keys.shape[2]
    return torch.arange(n_keys)[None, :] <= torch.arange(start, start + tokens)[:, None]


def by_query_head(rows: Tensor) -> Tensor:
    """Keys or values of each query head."""
    return rows.repeat_interleave(HEADS // KV_HEADS, dim=1)


def without_second_key(values: Tensor, at_fault: bool) -> Tensor:
    """Values of which decode reads the second one twice, where there is a fault."""
    return torch.cat([values[:, :, 1:2], values[:, :, 1:]], dim=2) if at_fault else values


def first_of(audit: Audit) -> tuple[int | None, str] | None:
    """The layer and the site of the first failure, None without one."""
    found = audit.first_failure
    return None if found is None else (found.layer, str(found.site))


def plain(query: Tensor, keys: Tensor, values: Tensor, start: int, decoding: bool) -> Tensor:
    """Attention by torch's own kernel."""
    mask = causal(query, keys, start)
    return F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, enable_gqa=True)


Hold = Callable[[nn.Module, Sequence[nn.Module]], None]


class RMSNorm(nn.RMSNorm):
    """A norm over the features."""

    def __init__(self) -> None:
        super().__init__(WIDTH, eps=1e-6)


class Attention(nn.Module):
    """Attention with projections of its own, whose cache is given by the caller."""

    def __init__(self, number: int, core: Core = plain, behind: Behind | None = None) -> None:
        super().__init__()
        self.number, self.core, self.behind = number, core, behind
        self.q_proj = nn.Linear(WIDTH, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(WIDTH, KV_HEADS * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        decoding = x.shape[1] == 1 and start > 0
        query, key, value = (torch.unflatten(row, -1, (-1, DIM)).transpose(1, 2) for row in self.projected(x, decoding))
        rows = cache[self.number]
        if rows is not None:
            key, value = torch.cat([rows[0], key], dim=2), torch.cat([rows[1], value], dim=2)
        cache[self.number] = key, value
        context = self.core(query, key, value, start, decoding).transpose(1, 2).flatten(2)
        return self.project(context if self.behind is None else self.behind(context, x, decoding), decoding)

    def projected(self, x: Tensor, decoding: bool) -> Sequence[Tensor]:
        """Queries, keys and values of a row."""
        return [projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj)]

    def project(self, context: Tensor, decoding: bool) -> Tensor:
        """The output of a context."""
        out: Tensor = self.o_proj(context)
        return out


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, number: int, core: Core = plain, behind: Behind | None = None) -> None:
        super().__init__()
        self.norm, self.mlp_norm = RMSNorm(), RMSNorm()
        self.attention = Attention(number, core, behind)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))

    def forward(self, x: Tensor, cache: list[Any], start: int) -> Tensor:
        x = x + self.attention(self.norm(x), cache, start)
        return torch.add(x, self.mlp(self.mlp_norm(x)))


class Decoder(nn.Module):
    """A decoder of two layers; `hold` says in what they are held, and gives them in their order."""

    def __init__(self, layers: Sequence[nn.Module], hold: Hold | None = None) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(64, WIDTH), nn.Embedding(64, WIDTH)
        if hold is None:
            self.layers = nn.ModuleList(layers)
        else:
            hold(self, layers)
        self._order = tuple(layers)
        self.norm, self.head = RMSNorm(), nn.Linear(WIDTH, 64, bias=False)

    def forward(self, ids: Tensor, cache: list[Any], start: int) -> Tensor:
        x = self.tokens(ids) + self.places(torch.arange(start, start + ids.shape[1]))
        for layer in self._order:
            x = layer(x, cache, start)
        logits: Tensor = self.head(self.norm(x))
        return logits


def engine(
    model: nn.Module, dtype: torch.dtype = torch.float32, n_layers: int = 2, **options: Any
) -> kvdrift.TorchEngine:
    """An engine of a lively model, the same weights each time."""
    draw = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            values = torch.randn(parameter.shape, generator=draw)
            peaked = 1.8 if "q_proj" in name or "k_proj" in name else 1.0
            parameter.copy_(
                0.3 * values + 1.0 if parameter.ndim == 1 else values * peaked * parameter.shape[-1] ** -0.5
            )

    def rewind(cache: list[Any], length: int) -> None:
        cache[:] = [None if rows is None else tuple(each[:, :, :length] for each in rows) for rows in cache]

    return kvdrift.TorchEngine(
        model.to(dtype).eval(), step=model, new_cache=lambda most: [None] * n_layers, rewind=rewind, **options
    )


def audited(
    core: Core, dtype: torch.dtype = torch.float32, *, behind: Behind | None = None, at: int = 1, **options: Any
) -> Audit:
    """The audit of a decoder that attends by `core` in layer `at` and above; plain in those below."""
    layers = [Layer(n, core if n >= at else plain, behind if n >= at else None) for n in range(2)]
    return kvdrift.audit(engine(Decoder(layers), dtype), prompts=PROMPTS, span=2, **options)
