"""The corpus: faults that real engines had, re-created at decode only, each with its true first address."""

from __future__ import annotations

from kvdrift_bench.planted.torch.model import CleanTwin, Fault
from kvdrift_bench.planted.torch.registry import FAULTS, TWINS, faults_in, twins_in


def corpus_for(n_layers: int) -> tuple[Fault, ...]:
    """Return the faults for a model of `n_layers` layers; those of one layer are planted two thirds up.

    `Fault.applies` says which of them a model can carry, `Fault.needs` which a run can commit.
    """
    return faults_in(FAULTS, n_layers)


def clean_twins() -> tuple[CleanTwin, ...]:
    """Return all clean twins."""
    return twins_in(TWINS)
