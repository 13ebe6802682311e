"""The corpus of llama.cpp: faults that real engines had, re-created in its decode steps, with their true addresses."""

from __future__ import annotations

from kvdrift_bench.planted.llamacpp.attention import attention_faults
from kvdrift_bench.planted.llamacpp.cache import cache_faults
from kvdrift_bench.planted.llamacpp.kernels import kernel_faults
from kvdrift_bench.planted.llamacpp.model import LlamaFault
from kvdrift_bench.planted.llamacpp.modules import module_faults
from kvdrift_bench.planted.llamacpp.positions import position_faults
from kvdrift_bench.planted.llamacpp.precision import precision_faults


def corpus_for(n_layers: int) -> tuple[LlamaFault, ...]:
    """Return the faults for a model of `n_layers` layers; those of one layer are planted two thirds up.

    One that is also planted in torch models bears the same name there. `LlamaFault.applies` says which of them a file
    can carry as it is run.
    """
    layer = (2 * n_layers) // 3
    return (
        *position_faults(layer),
        *attention_faults(layer),
        *kernel_faults(),
        *cache_faults(layer),
        *precision_faults(),
        *module_faults(),
    )
