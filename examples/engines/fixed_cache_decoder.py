"""A decoder as people write it for speed: one file, plain torch, a cache of a fixed size that is written by position.

Rotary positions in neighbouring pairs, grouped queries, one matrix for queries, keys and values, RMS norms without
weights, a table of masks. It knows nothing of kvdrift.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rows(nn.Module):
    """Keys and values [1, kv head, slot, dim] of one layer."""

    keys: Tensor
    values: Tensor

    def __init__(self, n_slots: int, kv_heads: int, dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("keys", torch.zeros(1, kv_heads, n_slots, dim, dtype=dtype), persistent=False)
        self.register_buffer("values", torch.zeros(1, kv_heads, n_slots, dim, dtype=dtype), persistent=False)

    def write(self, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        self.keys[:, :, places], self.values[:, :, places] = k, v
        return self.keys, self.values


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.dim = heads, kv_heads, width // heads
        self.wqkv = nn.Linear(width, (heads + 2 * kv_heads) * self.dim, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.rows: Rows | None = None

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        sizes = [n * self.dim for n in (self.heads, self.kv_heads, self.kv_heads)]
        q, k, v = (part.unflatten(-1, (-1, self.dim)) for part in self.wqkv(x).split(sizes, dim=-1))
        q, k = turned(q, turns), turned(k, turns)
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))
        assert self.rows is not None
        k, v = self.rows.write(places, k, v)
        k, v = (part.repeat_interleave(self.heads // self.kv_heads, dim=1) for part in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        projected: Tensor = self.wo(out.transpose(1, 2).flatten(2))
        return projected


class Block(nn.Module):
    def __init__(self, width: int, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = (nn.RMSNorm(width, eps=1e-5, elementwise_affine=False) for _ in range(2))
        self.attention = Attention(width, heads, kv_heads)
        self.feed_forward = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False), nn.SiLU(), nn.Linear(4 * width, width, bias=False)
        )

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor, places: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), turns, mask, places)
        added: Tensor = self.feed_forward(self.ffn_norm(x))
        return x + added


class Decoder(nn.Module):
    """Logits [1, token, vocabulary] of `tokens` [1, token] at `places` [token]."""

    layers: Any
    seen: Tensor
    angles: Tensor

    def __init__(self, vocab: int = 96, width: int = 32, heads: int = 4, kv_heads: int = 2, depth: int = 3) -> None:
        super().__init__()
        self.n_slots, self.dim, self.kv_heads = 64, width // heads, kv_heads
        self.tok_embeddings = nn.Embedding(vocab, width)
        self.layers = nn.ModuleList(Block(width, heads, kv_heads) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5, elementwise_affine=False)
        self.output = nn.Linear(width, vocab, bias=False)
        self.register_buffer("seen", torch.ones(self.n_slots, self.n_slots).tril().bool(), persistent=False)
        speeds = 10000.0 ** -(torch.arange(0, self.dim, 2) / self.dim)
        self.register_buffer("angles", torch.arange(self.n_slots)[:, None] * speeds, persistent=False)

    def forward(self, tokens: Tensor, places: Tensor) -> Tensor:
        x, turns, mask = self.tok_embeddings(tokens), self.angles[places], self.seen[None, None, places]
        for layer in self.layers:
            x = layer(x, turns, mask, places)
        logits: Tensor = self.output(self.norm(x))
        return logits


def turned(x: Tensor, turns: Tensor) -> Tensor:
    """Rotate neighbouring pairs of `x` [1, token, head, dim] by the angles [token, pair]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = turns.cos()[:, None].to(x.dtype), turns.sin()[:, None].to(x.dtype)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def new_rows(model: Any, n_slots: int) -> list[Rows]:
    """Return an empty cache, in the dtype that the model has now."""
    return [Rows(n_slots, model.kv_heads, model.dim, model.output.weight.dtype) for _ in model.layers]
