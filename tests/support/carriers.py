"""Which tiny model carries which planted fault: the first architecture that can."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch

from kvdrift.faults.model import CleanTwin, Fault
from tests.support.tiny import tiny_model

N_LAYERS = 3
PROMPT = [5, 9, 17, 3, 44, 2, 8, 61, 30, 7, 12]
PROMPTS = {"p": PROMPT}

CARRIERS = ("llama", "gemma2", "gpt2", "bloom", "qwen3", "mixtral", "gpt_oss", "phi3", "mamba2", "gemma3n")


@cache
def lively(architecture: str, dtype: str) -> Any:
    """Return a tiny model in which nothing is zero or one by initialisation; models are shared between tests."""
    options = {"experts_implementation": "eager"} if architecture in ("mixtral", "gpt_oss") else {}
    return tiny_model(architecture, dtype=getattr(torch, dtype), lively=True, **options)


def carrier_of(planted: Fault | CleanTwin, dtype: str = "float32") -> tuple[str, Any]:
    """Return the name of the first architecture that can carry it, and its tiny model."""
    reasons = {}
    for architecture in CARRIERS:
        model = lively(architecture, dtype)
        reasons[architecture] = planted.applies(model)
        if reasons[architecture] is None:
            return architecture, model
    raise AssertionError(f"no tiny model can carry {planted.name}: {reasons}")


@contextmanager
def one_thread() -> Iterator[None]:
    """Run torch on one thread while the context is open: on tensors this small, threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
