"""A decoder of nobody's library: plain modules, attention by products and a softmax, a cache of buffers.

`Attention` has one method for each thing that engines do in ways of their own; classes that derive from it do another
one, in decode steps alone (`tokens == 1`) or in both passes, right or wrong.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kvdrift

HIDDEN, HEADS, KV_HEADS, DIM, LAYERS, VOCABULARY = 64, 4, 2, 16, 3, 128
FAULTY = 1  # the layer in which faults of one layer are


def wide(x: Tensor) -> Tensor:
    """The values in float32, or in float64 where they are that already."""
    return x if x.dtype == torch.float64 else x.float()


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1.0 + 0.2 * torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        h = wide(x)
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5) * self.weight.to(h.dtype)).to(x.dtype)


def rotated(x: Tensor, positions: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate x [row, head, token, dim] to positions [token], pairs a half of the dims apart."""
    dim = x.shape[-1]
    angles = positions.double()[:, None] * base ** -(torch.arange(0, dim, 2).double() / dim)
    cos, sin = angles.cos().to(wide(x).dtype), angles.sin().to(wide(x).dtype)
    first, second = wide(x).chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


class Attention(nn.Module):
    """Grouped heads; queries and keys rotated before keys are stored."""

    width = DIM  # of what a head of queries has

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index
        self.build()

    def build(self) -> None:
        self.q_proj = nn.Linear(HIDDEN, HEADS * DIM, bias=False)
        self.k_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.v_proj = nn.Linear(HIDDEN, KV_HEADS * DIM, bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, HIDDEN, bias=False)

    @classmethod
    def new_rows(cls, length: int, dtype: torch.dtype) -> dict[str, Tensor]:
        """An empty cache of one layer."""
        return {name: torch.zeros(1, KV_HEADS, length, DIM, dtype=dtype) for name in ("k", "v")}

    def made(self) -> tuple[nn.Linear, ...]:
        return self.q_proj, self.k_proj, self.v_proj

    def project(self, x: Tensor, norm: Norm) -> tuple[Tensor, ...]:
        """Queries, keys and values of a residual stream."""
        x = norm(x)
        return tuple(made(x) for made in self.made())

    def forward(self, x: Tensor, rows: dict[str, Tensor], start: int, norm: Norm) -> Tensor:
        tokens = x.shape[1]

        def heads(y: Tensor) -> Tensor:
            return y.view(1, tokens, -1, DIM).transpose(1, 2)

        positions = torch.arange(start, start + tokens)
        query, key, value = self.project(x, norm)
        q, k = self.turn(heads(query), heads(key), positions)
        self.write(rows, k, heads(value), start)
        k, v = self.read(rows, start + tokens, tokens)
        context = self.attend(q, k, v, self.visible(start, tokens))
        out: Tensor = self.o_proj(context.transpose(1, 2).reshape(1, tokens, -1))
        return out

    def turn(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return rotated(q, positions), rotated(k, positions)

    def write(self, rows: dict[str, Tensor], k: Tensor, v: Tensor, start: int) -> None:
        rows["k"][:, :, start : start + k.shape[2]] = k
        rows["v"][:, :, start : start + k.shape[2]] = v

    def read(self, rows: dict[str, Tensor], length: int, tokens: int) -> tuple[Tensor, Tensor]:
        return rows["k"][:, :, :length], rows["v"][:, :, :length]

    def visible(self, start: int, tokens: int) -> Tensor:
        """Which keys [token, key] each token sees."""
        return torch.arange(start + tokens)[None] <= torch.arange(start, start + tokens)[:, None]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, dim=1) for t in (k, v))
        scores = self.scored(wide(q) @ wide(k).transpose(2, 3) * DIM**-0.5)
        return self.weighed(scores.masked_fill(~visible, -torch.inf), v).to(q.dtype)

    def scored(self, scores: Tensor) -> Tensor:
        return scores

    def weighed(self, scores: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(scores, -1).to(v.dtype) @ v


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj, self.down_proj = nn.Linear(HIDDEN, 96, bias=False), nn.Linear(96, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.up_proj(x)))
        return out


class Layer(nn.Module):
    def __init__(self, attention: type[Attention], index: int) -> None:
        super().__init__()
        self.input_norm, self.attention = Norm(HIDDEN), attention(index)
        self.ffn_norm, self.mlp = Norm(HIDDEN), Feed()

    def forward(self, x: Tensor, rows: dict[str, Tensor], start: int) -> Tensor:
        x = x + self.attention(x, rows, start, self.input_norm)
        out: Tensor = x + self.mlp(self.ffn_norm(x))
        return out


class Decoder(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(Layer(attention, index) for index in range(LAYERS))
        self.norm, self.head = Norm(HIDDEN), nn.Linear(HIDDEN, VOCABULARY, bias=False)

    def forward(self, ids: Tensor, cache: list[dict[str, Tensor]], start: int) -> Tensor:
        x = self.embed(ids)
        for layer, rows in zip(self.layers, cache, strict=True):
            x = layer(x, rows, start)
        logits: Tensor = self.head(self.norm(x))
        return logits


def engine_of(attention: type[Attention], dtype: torch.dtype = torch.bfloat16) -> Any:
    """Return an engine for a seeded decoder that attends by `attention`, with peaked attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1234)
        model = Decoder(attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.5 if "q_" in name or "k_" in name else 1.2)
    model = model.to(dtype).eval()

    def new_cache(length: int) -> list[dict[str, Tensor]]:
        kept = model.head.weight.dtype
        return [attention.new_rows(length, kept) for _ in range(LAYERS)]

    return kvdrift.TorchEngine(model, step=model, new_cache=new_cache, rewind=lambda cache, length: None)
