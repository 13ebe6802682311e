"""A fault of llama.cpp that shows only where several rows are computed in one call."""

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor


class SeesItsNeighbours(Faultless):
    """In a call for several rows, every token sees the cells of the others."""

    def before(self, node: Tensor, call: Fed) -> None:
        mask = node.source(1) if node.op == "SOFT_MAX" else None
        if mask is not None and len({sequence for sequence, _ in call.members}) > 1:
            values = mask.values().copy()
            values[..., : len(call.members)] = 0.0
            mask.write(values)
