"""Correct kernels by other means, and faults of such kernels, for torch models. Loads torch when it is asked."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvdrift_bench.planted.kernels.registry import Kernel, KernelFault

__all__ = ["correct_kernels", "faults_of_kernels"]


def correct_kernels() -> tuple[Kernel, ...]:
    """Return every correct kernel."""
    from kvdrift_bench.planted.kernels import registry

    return registry.kernels_in(registry.KERNELS)


def faults_of_kernels(n_layers: int) -> tuple[KernelFault, ...]:
    """Return every fault of a kernel, for a model of `n_layers` layers."""
    from kvdrift_bench.planted.kernels import registry

    return registry.kernel_faults_in(registry.KERNEL_FAULTS, n_layers)
