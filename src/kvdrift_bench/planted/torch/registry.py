"""The decorators that make a function a planted fault or a clean twin of torch models.

    @fault(needs_interface)
    @in_attention
    def first_key_lost(call: AttentionCall) -> bool:
        return keep(call, slice(1, None))

The name of the function is the name of its line in the catalogue; the seam beneath, here `in_attention`, says where it
strikes. `faults` and `twins` register several that differ by one value.
"""

from __future__ import annotations

from dataclasses import asdict

from torch import nn

from kvdrift_bench.catalogue import FaultLine, TwinLine, catalogue
from kvdrift_bench.planted.facts import fault_layer_of
from kvdrift_bench.planted.registry import Registry
from kvdrift_bench.planted.torch.model import CleanTwin, Fault
from kvdrift_bench.planted.torch.ways import Way, planted

_PACKAGE = "kvdrift_bench.planted.torch"

Faults = Registry[FaultLine, Way, nn.Module]
Twins = Registry[TwinLine, Way, nn.Module]
FAULTS: Faults = Registry(catalogue().faults_of("torch"), _PACKAGE)
TWINS: Twins = Registry(catalogue().twins_of("torch"), _PACKAGE)
fault, faults = FAULTS.plant, FAULTS.family
twin, twins = TWINS.plant, TWINS.family


def faults_in(registry: Faults, n_layers: int) -> tuple[Fault, ...]:
    """Return the faults of a registry for a model of `n_layers` layers, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    layer = fault_layer_of(n_layers)
    return tuple(
        Fault(
            **(asdict(line.facts(name, layer)) | {"find_layer": planting.first}),
            plant=planted(planting.what, fault_layer=layer),
            dtypes=line.dtypes,
            needs=line.needs,
            applies=planting.applies,
        )
        for name, line, planting in registry.bound()
    )


def twins_in(registry: Twins) -> tuple[CleanTwin, ...]:
    """Return the clean twins of a registry, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    return tuple(
        CleanTwin(**asdict(line.facts(name)), plant=planted(planting.what), applies=planting.applies)
        for name, line, planting in registry.bound()
    )
