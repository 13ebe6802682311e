"""Correct kernels and faults of kernels, each with the line of the catalogue that has its name.

    @kernel(plain_scores)
    @in_attention
    def smoothed_keys(call: AttentionCall) -> Tensor: ...

A correct kernel runs in decode steps alone or in both passes, a fault in decode steps alone, with the correct kernel in
prefill or torch itself.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from torch import nn

from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift_bench.catalogue import KernelFaultLine, KernelLine, Passes, catalogue
from kvdrift_bench.planted.facts import FaultFacts, anywhere, fault_layer_of
from kvdrift_bench.planted.registry import Registry
from kvdrift_bench.planted.torch.model import Applies, Plant
from kvdrift_bench.planted.torch.ways import Way, planted

_PACKAGE = "kvdrift_bench.planted.kernels"

KERNELS: Registry[KernelLine, Way, nn.Module] = Registry(catalogue().kernels, _PACKAGE)
KERNEL_FAULTS: Registry[KernelFaultLine, Way, nn.Module] = Registry(catalogue().kernel_faults, _PACKAGE)
kernel, kernels = KERNELS.plant, KERNELS.family
broken, broken_ones = KERNEL_FAULTS.plant, KERNEL_FAULTS.family


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """A correct implementation of a part of a model by other means.

    Attributes:
        name: unique, in words of what computes and how.
        engine: what computes in this way.
        why: why the function is the same.
        computes: the dtype whose roundings it makes, whatever the dtype of the model is.
        passes: the passes in which it is planted.
        way: plants it.
        applies: says why a model cannot carry it, None if it can.
    """

    name: str
    engine: str
    why: str
    computes: str
    passes: tuple[Passes, ...]
    way: Way
    applies: Applies = anywhere

    def plant(self, model: nn.Module, passes: Passes) -> AbstractContextManager[Any]:
        """Return the context in which it computes for `model`; it yields its `Commits`."""
        return planted(self.way, everywhere=passes == "both")(model)

    def why_not(self, model: nn.Module, dtype: str, passes: Passes) -> str | None:
        """Why it is not a correct kernel of a model of this dtype in these passes, None if it is one.

        A decode step that rounds more coarsely than the model's dtype, beside a prefill that does not, is a mismatch.
        """
        if passes not in self.passes:
            return f"is not planted in {passes}"
        if passes == "decode" and UNIT_ROUNDOFF[self.computes] > UNIT_ROUNDOFF[dtype]:
            return f"rounds to {self.computes}, which is coarser than {dtype}"
        return self.applies(model)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelFault(FaultFacts):
    """A fault of a kernel, committed in decode steps.

    Attributes:
        under: the correct kernel that it is a fault of.
        plant: puts it into a model; the context yields its `Commits`.
        applies: says why a model cannot carry it, None if it can.
    """

    under: str
    plant: Plant
    applies: Applies = anywhere


def kernels_in(registry: Registry[KernelLine, Way, nn.Module]) -> tuple[Kernel, ...]:
    """Return the correct kernels of a registry, in the order of its catalogue.

    Raises:
        LookupError: a line has no function.
    """
    return tuple(
        Kernel(
            name=name,
            engine=line.engine,
            why=line.why,
            computes=line.computes,
            passes=line.passes,
            way=planting.what,
            applies=planting.applies,
        )
        for name, line, planting in registry.bound()
    )


def kernel_faults_in(registry: Registry[KernelFaultLine, Way, nn.Module], n_layers: int) -> tuple[KernelFault, ...]:
    """Return the faults of kernels for a model of `n_layers` layers; those of one layer are planted two thirds up.

    Raises:
        LookupError: a line has no function.
    """
    layer = fault_layer_of(n_layers)
    return tuple(
        KernelFault(
            name=name,
            mechanism="kernel",
            reference="",
            where=line.where.replace("{layer}", str(layer)),
            sites=line.sites,
            cause=line.cause,
            layer=layer if line.layer else None,
            under=line.under,
            plant=planted(planting.what, fault_layer=layer),
            applies=planting.applies,
        )
        for name, line, planting in registry.bound()
    )
