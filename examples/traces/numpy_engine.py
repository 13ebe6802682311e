"""A small transformer in plain numpy with a real KV cache, which writes traces for `kvdrift judge`.

    python examples/traces/numpy_engine.py traces            # a correct decode path: STRUCTURAL_DRIFT
    python examples/traces/numpy_engine.py traces --bug position   # decode rotates queries one position too far
    kvdrift judge traces

Prefill multiplies matrices, decode multiplies a matrix and a vector, so that the two round differently.
"""

import argparse
from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.trace import Writer

Array = NDArray[Any]

LAYERS, WIDTH, HEADS, KV_HEADS, DIM, HIDDEN, VOCAB = 2, 48, 4, 2, 12, 96, 64
PROMPTS = {"first": [5, 9, 17, 3, 44, 2, 8, 61, 30, 7], "second": [1, 40, 22, 13, 6, 50, 11, 29]}
N_DECODED = 3  # the last tokens of each prompt are decoded one by one
BUGS = ("none", "position", "stale", "scale")


class Engine:
    """A decoder with RMS norms, rotary positions, grouped heads and a gated feed-forward part."""

    def __init__(self, dtype: type[np.floating[Any]], bug: str) -> None:
        rng = np.random.default_rng(7)
        shapes = {
            "q": (WIDTH, HEADS * DIM),
            "k": (WIDTH, KV_HEADS * DIM),
            "v": (WIDTH, KV_HEADS * DIM),
            "o": (HEADS * DIM, WIDTH),
            "gate": (WIDTH, HIDDEN),
            "up": (WIDTH, HIDDEN),
            "down": (HIDDEN, WIDTH),
        }
        self.layers = [
            {name: rng.normal(size=s, scale=2.0 / s[0] ** 0.5).astype(dtype) for name, s in shapes.items()}
            for _ in range(LAYERS)
        ]
        self.embedding = rng.normal(size=(VOCAB, WIDTH)).astype(dtype)
        self.dtype, self.bug, self.scale = dtype, bug, DIM**-0.5
        self.cache = [
            {"k": np.zeros((0, KV_HEADS, DIM), dtype), "v": np.zeros((0, KV_HEADS, DIM), dtype)} for _ in range(LAYERS)
        ]

    def forward(self, tokens: Sequence[int], out: Any = None, record: Collection[int] = ()) -> None:
        """Feed tokens on top of the cache; hand the sites at the positions in `record` to the pass `out`."""
        start, decoding = len(self.cache[0]["k"]), len(self.cache[0]["k"]) > 0
        positions = np.arange(start, start + len(tokens))
        kept = [i for i, p in enumerate(positions) if p in record]

        def put(site: str, values: Array, layer: int | None = None) -> Array:
            if out is not None and kept:
                out.rows(site, values[kept], positions=positions[kept], layer=layer)
            return values

        x = put("embed_out", self.embedding[tokens])
        for n, w in enumerate(self.layers):
            h = put("attn_norm_out", rms_norm(put("layer_in", x, n)), n)
            q, k, v = (put(f"{name}_proj", product(h, w[name]), n) for name in "qkv")
            wrong = 1 if decoding and self.bug == "position" else 0
            q = put("q_rope", rotate(q.reshape(len(tokens), HEADS, DIM), positions + wrong), n)
            k = put("k_rope", rotate(k.reshape(len(tokens), KV_HEADS, DIM), positions), n)
            cache = self.cache[n]
            cache["k"] = np.concatenate([cache["k"], k])
            cache["v"] = np.concatenate([cache["v"], v.reshape(len(tokens), KV_HEADS, DIM)])
            if decoding and self.bug == "stale" and n == 1:
                cache["k"][2] = cache["k"][1]
            scale = self.scale * (1.01 if decoding and self.bug == "scale" else 1.0)
            context = np.stack([self.attend(q[p - start], n, p, scale, out, p in record) for p in positions.tolist()])
            x = put("resid_attn", x + put("attn_out", product(put("attn_ctx", context, n), w["o"]), n), n)
            h = put("ffn_norm_out", rms_norm(x), n)
            gate = product(h, w["gate"])
            mlp = product(gate / (1 + np.exp(-gate)) * product(h, w["up"]), w["down"])
            x = put("layer_out", x + put("mlp_out", mlp, n), n)
        x = put("final_norm_out", rms_norm(x))
        put("logits", product(x, self.embedding.T))
        if out is not None:
            out.call(start, len(tokens), start, kv_len=start + len(tokens), attention="numpy")

    def attend(self, q: Array, n: int, position: int, scale: float, out: Any, recorded: bool) -> Array:
        """Attention of one token over the cached rows up to its own position; records the rows that it reads."""
        keys, values = self.cache[n]["k"][: position + 1], self.cache[n]["v"][: position + 1]
        scores = np.einsum("hd,shd->hs", q, np.repeat(keys, HEADS // KV_HEADS, axis=1)) * self.dtype(scale)
        probs = np.exp(scores - scores.max(axis=1, keepdims=True))
        probs /= probs.sum(axis=1, keepdims=True)
        if out is not None and recorded:
            out.cache("k_cache", keys, position=position, layer=n)
            out.cache("v_cache", values, position=position, layer=n)
            out.rows("attn_scores", scores[None], positions=[position], layer=n)
            out.attention(n, scale=self.scale)
        context: Array = np.einsum("hs,shd->hd", probs, np.repeat(values, HEADS // KV_HEADS, axis=1))
        return context.reshape(-1)


def product(x: Array, w: Array) -> Array:
    """x @ w; a single row is summed in another order, as a decode kernel does it."""
    half = x.shape[1] // 2
    made: Array = x @ w if len(x) > 1 else x[:, half:] @ w[half:] + x[:, :half] @ w[:half]
    return made


def rms_norm(x: Array) -> Array:
    normed: Array = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + x.dtype.type(1e-5))
    return normed


def rotate(x: Array, positions: Array) -> Array:
    angle = positions[:, None, None] * 100.0 ** (-np.arange(0, DIM, 2) / DIM)
    cos, sin = np.cos(angle).astype(x.dtype), np.sin(angle).astype(x.dtype)
    first, second = x[..., : DIM // 2], x[..., DIM // 2 :]
    return np.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--bug", choices=BUGS, default="none")
    parser.add_argument("--no-ladder", action="store_true", help="write float32 alone")
    options = parser.parse_args()
    writer = Writer(options.directory, engine="numpy_engine", model="2 layers", dtype="float32", n_layers=LAYERS)
    for dtype in (np.float32,) if options.no_ladder else (np.float32, np.float64):
        for name, tokens in PROMPTS.items():
            first = len(tokens) - N_DECODED
            decoded = range(first, len(tokens))
            rung = np.dtype(dtype).name
            with writer.prefill(name, tokens, dtype=rung) as out:
                Engine(dtype, options.bug).forward(tokens, out, [first - 1, *decoded])
            with writer.prefill_again(name, tokens, dtype=rung) as out:
                engine = Engine(dtype, options.bug)
                engine.forward(tokens[:first], out, [first - 1])
            with writer.decode(name, tokens, dtype=rung) as out:
                for position in decoded:
                    engine.forward(tokens[position : position + 1], out, [position])
            full = Engine(dtype, options.bug)
            full.forward(tokens)
            with writer.decode(name, tokens, dtype=rung, mode="kv_aligned") as out:
                for position in decoded:
                    aligned = Engine(dtype, options.bug)
                    aligned.cache = [{k: rows[:position] for k, rows in layer.items()} for layer in full.cache]
                    aligned.forward(tokens[position : position + 1], out, [position])
    writer.finish()


if __name__ == "__main__":
    main()
