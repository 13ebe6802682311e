"""Dumps of logprobs as sampler and trainer write them: logits that both round, tokens drawn from the sampler's."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

VOCABULARY, N_SEQUENCES, N_TOKENS = 50, 24, 40
# What bfloat16 moves a logit of a small model by.
ROUNDING = 0.06


@dataclass
class Sides:
    """Logits [sequence, token, vocabulary] by side, and tokens [sequence, token] that were drawn from the sampler's."""

    logits: dict[str, NDArray[np.float64]]
    tokens: NDArray[np.int64]

    def logprobs(self, side: str, *, temperature: float = 1.0) -> NDArray[np.float64]:
        """Logprobs of the tokens [sequence, token]."""
        return np.take_along_axis(log_softmax(self.logits[side] / temperature), self.tokens[..., None], -1)[..., 0]

    def top(self, side: str, *, temperature: float = 1.0) -> list[list[dict[str, float]]]:
        """The three likeliest tokens of each position, with their logprobs."""
        values = log_softmax(self.logits[side] / temperature)
        best = np.argsort(-values, -1)[..., :3]
        return [
            [{str(i): float(values[s, t, i]) for i in best[s, t]} for t in range(N_TOKENS)] for s in range(len(values))
        ]


def log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


def simulate(seed: int = 0, *, rounding: float = ROUNDING, n: int = N_SEQUENCES) -> Sides:
    """Return sampler, trainer, prefill (by the sampler's engine) and repeat, which all round the same logits."""
    rng = np.random.default_rng(seed)
    exact = 2.5 * rng.standard_normal((n, N_TOKENS, VOCABULARY))
    logits = {
        name: exact + rounding * rng.standard_normal(exact.shape)
        for name in ("sampler", "trainer", "prefill", "repeat")
    }
    chances = np.exp(log_softmax(logits["sampler"])).cumsum(-1)
    tokens = (rng.random((n, N_TOKENS, 1)) < chances).argmax(-1)
    return Sides(logits, tokens)


def write(path: Path, tokens: NDArray[Any], logprobs: NDArray[Any], **columns: list[Any]) -> Path:
    """Write a dump, a sequence a line; `columns` has a value of each sequence."""
    with path.open("w", encoding="utf-8") as file:
        for i, (ids, values) in enumerate(zip(tokens, logprobs, strict=True)):
            row = {"id": f"s{i}", "token_ids": [int(t) for t in ids], "logprobs": [float(value) for value in values]}
            file.write(json.dumps({**row, **{name: values[i] for name, values in columns.items()}}) + "\n")
    return path


def write_all(folder: Path, sides: Sides) -> dict[str, Path]:
    """Write one dump for each side, and one file with two columns."""
    paths = {name: write(folder / f"{name}.jsonl", sides.tokens, sides.logprobs(name)) for name in sides.logits}
    rows = zip(sides.tokens, sides.logprobs("sampler"), sides.logprobs("trainer"), strict=True)
    lines = [
        json.dumps({"response_ids": t.tolist(), "rollout_log_probs": a.tolist(), "old_log_probs": b.tolist()})
        for t, a, b in rows
    ]
    paths["rollout"] = folder / "rollout.jsonl"
    paths["rollout"].write_text("\n".join(lines) + "\n")
    return paths
