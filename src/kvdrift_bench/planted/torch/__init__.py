"""Planted faults with known true addresses, and clean twins: the proof that a detector can fire, and can be quiet.

What is named here is planted in torch models, and loads torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvdrift_bench.planted.torch.corpus import clean_twins, corpus_for
    from kvdrift_bench.planted.torch.model import CleanTwin, Commits, Fault
    from kvdrift_bench.planted.torch.size import measured

__all__ = ["CleanTwin", "Commits", "Fault", "clean_twins", "corpus_for", "measured"]

_HOMES = {
    "CleanTwin": "model",
    "Commits": "model",
    "Fault": "model",
    "clean_twins": "corpus",
    "corpus_for": "corpus",
    "measured": "size",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
