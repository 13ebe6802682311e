"""A decoder in plain numpy with a cache that grows: rotary positions, grouped heads, RMS norms, a gated MLP.

It knows nothing of kvdrift: `see(layer, site, values)` is any function that returns what to go on with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

HEADS, KV_HEADS, DIM, HIDDEN, VOCAB = 4, 2, 8, 64, 96
WIDTH = HEADS * DIM
Cache = list[tuple[Any, Any]]
See = Callable[[int | None, str, Any], Any]


class Decoder:
    """Logits [token, vocabulary] of `tokens`, and the cache with their rows."""

    def __init__(self, depth: int = 3, dtype: Any = np.float32) -> None:
        rng = np.random.default_rng(7)
        kv = KV_HEADS * DIM
        shapes = {"q": (WIDTH, WIDTH), "k": (WIDTH, kv), "v": (WIDTH, kv), "o": (WIDTH, WIDTH)}
        shapes |= {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
        self.weights = {"embedding": rng.normal(size=(VOCAB, WIDTH)).astype(dtype)}
        for layer in range(depth):
            for name, shape in shapes.items():
                self.weights[f"{layer}.{name}"] = rng.normal(size=shape, scale=2.0 / shape[0] ** 0.5).astype(dtype)
        self.depth = depth

    def empty(self) -> Cache:
        none = np.zeros((0, KV_HEADS, DIM), self.weights["embedding"].dtype)
        return [(none, none)] * self.depth

    def forward(self, tokens: list[int], cache: Cache, start: int, see: See) -> tuple[Any, Cache]:
        places, w = np.arange(start, start + len(tokens)), self.weights
        x, after = see(None, "embed_out", w["embedding"][tokens]), []
        for n in range(self.depth):
            x = see(n, "layer_in", x)
            normed = see(n, "attn_norm_out", rms_norm(x))
            q, k, v = (see(n, f"{name}_proj", product(normed, w[f"{n}.{name}"])) for name in "qkv")
            q = see(n, "q_rope", self.rotated(n, q.reshape(len(tokens), HEADS, DIM), places))
            k = see(n, "k_rope", rotate(k.reshape(len(tokens), KV_HEADS, DIM), places))
            keys, values = cache[n]
            keys = np.concatenate([keys, k])
            values = np.concatenate([values, v.reshape(len(tokens), KV_HEADS, DIM)])
            after.append((keys, values))
            keys, values = self.read(n, keys, values, len(tokens))
            context = self.attend(n, q, see(n, "k_cache", keys), see(n, "v_cache", values), places, see)
            x = see(n, "resid_attn", x + see(n, "attn_out", product(see(n, "attn_ctx", context), w[f"{n}.o"])))
            h = see(n, "ffn_norm_out", rms_norm(x))
            gate = product(h, w[f"{n}.gate"])
            mlp = product(gate / (1 + np.exp(-gate)) * product(h, w[f"{n}.up"]), w[f"{n}.down"])
            x = see(n, "layer_out", x + see(n, "mlp_out", mlp))
        return product(see(None, "final_norm_out", rms_norm(x)), w["embedding"].T), after

    def rotated(self, n: int, q: Any, places: Any) -> Any:
        """Queries turned by their positions."""
        return rotate(q, places)

    def read(self, n: int, keys: Any, values: Any, n_tokens: int) -> tuple[Any, Any]:
        """The rows [slot, kv head, dim] that attention reads."""
        return keys, values

    def attend(self, n: int, q: Any, keys: Any, values: Any, places: Any, see: See) -> Any:
        keys, values = (np.repeat(rows, HEADS // KV_HEADS, axis=1) for rows in (keys, values))
        scores = np.einsum("thd,shd->ths", q, keys) * q.dtype.type(DIM**-0.5)
        hidden = np.arange(len(keys)) > places[:, None, None]
        scores = see(n, "attn_scores", np.where(hidden, q.dtype.type(-np.inf), scores))
        probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
        probs = see(n, "attn_probs", probs / probs.sum(axis=-1, keepdims=True))
        return np.einsum("ths,shd->thd", probs, values).reshape(len(q), WIDTH)


def product(x: Any, w: Any) -> Any:
    """x @ w; a single row is summed in another order, as a decode kernel does it."""
    if len(x) > 1:
        return x @ w
    half = x.shape[1] // 2
    return x[:, half:] @ w[half:] + x[:, :half] @ w[:half]


def rms_norm(x: Any) -> Any:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(1e-5))


def rotate(x: Any, places: Any) -> Any:
    angle = places[:, None, None] * 100.0 ** (-np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)
