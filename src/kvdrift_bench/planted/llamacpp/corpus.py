"""The corpus of llama.cpp: faults that real engines had, re-created in its decode steps, with their true addresses."""

from __future__ import annotations

from kvdrift_bench.planted.llamacpp.model import LlamaFault, LlamaTwin
from kvdrift_bench.planted.llamacpp.registry import FAULTS, TWINS, faults_in, twins_in


def corpus_for(n_layers: int) -> tuple[LlamaFault, ...]:
    """Return the faults for a model of `n_layers` layers; those of one layer are planted two thirds up.

    One that is also planted in torch models bears the same name there. `LlamaFault.applies` says which of them a file
    can carry as it is run.
    """
    return faults_in(FAULTS, n_layers)


def clean_twins() -> tuple[LlamaTwin, ...]:
    """Return the harmless changes that can be planted in llama.cpp."""
    return twins_in(TWINS)
