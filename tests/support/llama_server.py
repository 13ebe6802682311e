"""The real llama-server on tiny models and what is planted into it, as the tests of the server route use them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvdrift_bench.models.tiny_gguf import write_tiny_gguf

# What `turned_back` must know of the tiny model.
HEAD_DIM, ROPE_BASE = 32, 10000.0


def tiny_with_text(folder: Path, weights: str = "F32") -> Path:
    """Return a tiny model that llama-server can serve; it is written once for each type of weights."""
    path = folder / f"tiny-{weights}.gguf"
    return path if path.exists() else write_tiny_gguf(path, "llama", reads_text=True, weights=weights)


def byte_prompts(n: int = 12) -> dict[str, list[int]]:
    """Prompts of 5 to 60 ids of the tokenizer of bytes, BOS first: their continuations lie on both sides of 64."""
    rng = np.random.default_rng(11)
    return {f"p{i:02}": [1, *(int(t) for t in rng.integers(3, 131, 4 + 5 * i))] for i in range(n)}
