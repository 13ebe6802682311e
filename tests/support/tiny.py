"""Tiny random models of real transformers architectures, with peaked attention."""

from __future__ import annotations

import torch

from kvdrift_bench.models.architectures import ARCHITECTURES
from kvdrift_bench.models.tiny import build_tiny as tiny_model

# Tiny matrices gain nothing from threads, and on a busy machine they lose a factor of ten by waiting for each other.
torch.set_num_threads(1)

__all__ = ["ARCHITECTURES", "tiny_model"]
