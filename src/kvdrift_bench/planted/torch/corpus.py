"""The corpus: faults that real engines had, re-created at decode only, each with its true first address."""

from __future__ import annotations

from kvdrift_bench.planted.torch.model import CleanTwin, Fault
from kvdrift_bench.planted.torch.registry import FAULTS, TWINS, faults_in, twins_in
from kvdrift_bench.planted.torch.scenario_alone import lone_faults
from kvdrift_bench.planted.torch.scenario_caches import cache_handling_faults
from kvdrift_bench.planted.torch.scenario_history import history_faults
from kvdrift_bench.planted.torch.scenario_lengths import length_faults
from kvdrift_bench.planted.torch.scenario_loops import loop_faults
from kvdrift_bench.planted.torch.scenario_only import scenario_faults
from kvdrift_bench.planted.torch.scenario_quantised import quantised_faults


def corpus_for(n_layers: int) -> tuple[Fault, ...]:
    """Return the faults for a model of `n_layers` layers; those of one layer are planted two thirds up.

    `Fault.applies` says which of them a model can carry, `Fault.needs` which a run can commit.
    """
    layer = (2 * n_layers) // 3
    return (
        *faults_in(FAULTS, n_layers),
        *scenario_faults(),
        *cache_handling_faults(),
        *length_faults(),
        *loop_faults(),
        *quantised_faults(layer),
        *history_faults(),
        *lone_faults(),
    )


def clean_twins() -> tuple[CleanTwin, ...]:
    """Return all clean twins."""
    return twins_in(TWINS)
