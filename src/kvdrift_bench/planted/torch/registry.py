"""The decorators that make a function a planted fault or a clean twin of torch models, and what they fill.

    @fault(needs_interface)
    @in_attention
    def first_key_lost(call: AttentionCall) -> bool:
        return keep(call, slice(1, None))

The name of the function is the name of its line in the catalogue; the seam beneath, here `in_attention`, says where it
strikes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import TypeVar

from kvdrift_bench.catalogue import FaultLine, TwinLine, catalogue
from kvdrift_bench.planted.facts import fault_layer_of
from kvdrift_bench.planted.registry import Registry, load_modules_beside
from kvdrift_bench.planted.torch.model import Applies, CleanTwin, Fault, FindLayer, anywhere
from kvdrift_bench.planted.torch.ways import Way, planted

Value = TypeVar("Value")
_load = partial(load_modules_beside, "kvdrift_bench.planted.torch")


@dataclass(frozen=True, slots=True)
class Planting:
    """A way to plant something, why a model cannot carry it, and how to find the first layer where that depends."""

    way: Way
    applies: Applies
    first: FindLayer | None = None


Faults = Registry[FaultLine, Planting]
Twins = Registry[TwinLine, Planting]
FAULTS: Faults = Registry(catalogue().faults_of("torch"), _load)
TWINS: Twins = Registry(catalogue().twins_of("torch"), _load)


def fault(
    applies: Applies = anywhere, *, name: str | None = None, first: FindLayer | None = None, registry: Faults = FAULTS
) -> Callable[[Way], Way]:
    """Return the decorator that registers a way as a fault.

    Args:
        applies: says why a model cannot carry it, None if it can.
        name: of its line in the catalogue, where it is no name of a function.
        first: finds the first layer that it touches, where that depends on the model.
        registry: where it is registered; the corpus unless given.

    The decorator raises:
        LookupError: the registry has no line of that name, or has its function already.
    """

    def register(way: Way) -> Way:
        registry.bind(name or way.__name__, Planting(way, applies, first))
        return way

    return register


def faults(values: Mapping[str, Value], applies: Applies = anywhere) -> Callable[[Callable[[Value], Way]], None]:
    """Return the decorator of a function from a value to a way, which registers one fault for each name in `values`."""

    def register(make: Callable[[Value], Way]) -> None:
        for name, value in values.items():
            fault(applies, name=name)(make(value))

    return register


def twin(applies: Applies = anywhere, *, name: str | None = None) -> Callable[[Way], Way]:
    """Return the decorator that registers a way as a clean twin. Arguments as those of `fault`."""

    def register(way: Way) -> Way:
        TWINS.bind(name or way.__name__, Planting(way, applies))
        return way

    return register


def twins(values: Mapping[str, Value], applies: Applies = anywhere) -> Callable[[Callable[[Value], Way]], None]:
    """Return the decorator of a function from a value to a way, which registers one clean twin for each name."""

    def register(make: Callable[[Value], Way]) -> None:
        for name, value in values.items():
            twin(applies, name=name)(make(value))

    return register


def faults_in(registry: Faults, n_layers: int) -> tuple[Fault, ...]:
    """Return the faults of a registry for a model of `n_layers` layers, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    layer = fault_layer_of(n_layers)
    return tuple(
        Fault(
            **(asdict(line.facts(name, layer)) | {"find_layer": planting.first}),
            plant=planted(planting.way, fault_layer=layer),
            dtypes=line.dtypes,
            needs=line.needs,
            applies=planting.applies,
        )
        for name, line, planting in registry.bound()
    )


def twins_in(registry: Twins) -> tuple[CleanTwin, ...]:
    """Return the clean twins of a registry.

    Raises:
        LookupError: a line has no function.
    """
    return tuple(
        CleanTwin(**asdict(line.facts(name)), plant=planted(planting.way), applies=planting.applies)
        for name, line, planting in registry.bound()
    )
