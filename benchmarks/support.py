"""The model that the benchmarks run on, and printing."""

from __future__ import annotations

import sys
from typing import Any

from kvdrift.engines.hf.load import LoadedModel, load_model

# What has been said, for docs/performance.md.
SAID: list[str] = []


def say(text: str) -> None:
    """Print one line at once."""
    SAID.append(text)
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def demo(dtype: str | None = None, attention: str | None = None) -> LoadedModel:
    """Load the embedded default model."""
    return load_model(None, dtype=dtype, attention=attention, progress=say)


def bytes_of(model: Any) -> int:
    """Return the size of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
