"""The decorators that make a change, or a class that watches a step, a planted fault or a clean twin of llama.cpp.

    @fault(attends)
    @hiding
    def first_key_lost(seen: Cells) -> Cells:
        return seen[:1]

The name of the function is the name of its line in the catalogue. `faults` registers several that differ by one value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial

from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift_bench.catalogue import FaultLine, TwinLine, catalogue
from kvdrift_bench.planted.facts import Tally, fault_layer_of
from kvdrift_bench.planted.llamacpp.model import Grounds, LlamaFault, LlamaTwin
from kvdrift_bench.planted.llamacpp.ways import Change, Counting, Hook
from kvdrift_bench.planted.registry import Registry

_PACKAGE = "kvdrift_bench.planted.llamacpp"

Planted = Change | type[Counting]
Faults = Registry[FaultLine, Planted, Grounds]
Twins = Registry[TwinLine, Planted, Grounds]
FAULTS: Faults = Registry(catalogue().faults_of("llamacpp"), _PACKAGE)
TWINS: Twins = Registry(catalogue().twins_of("llamacpp"), _PACKAGE)
fault, faults = FAULTS.plant, FAULTS.family
twin = TWINS.plant


def faults_in(registry: Faults, n_layers: int) -> tuple[LlamaFault, ...]:
    """Return the faults of a registry for a model of `n_layers` layers, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    layer = fault_layer_of(n_layers)
    return tuple(
        LlamaFault(
            **(asdict(line.facts(name, layer)) | {"find_layer": planting.first}),
            hook=_hook(planting.what),
            fault_layer=layer,
            applies=planting.applies,
        )
        for name, line, planting in registry.bound()
    )


def twins_in(registry: Twins) -> tuple[LlamaTwin, ...]:
    """Return the clean twins of a registry, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    return tuple(
        LlamaTwin(**asdict(line.facts(name)), hook=_hook(planting.what), applies=planting.applies)
        for name, line, planting in registry.bound()
    )


def _hook(planted: Planted) -> Callable[[Tally], Faultless]:
    """Return what makes a hook: a class by itself, a change around nodes through `Hook`."""
    return planted if isinstance(planted, type) else partial(Hook, planted)
