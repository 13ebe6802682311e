"""What may interfere with the graphs of llama.cpp, to measure whether an audit finds it: the base, which does not.

The faults themselves, and harmless changes, are in `kvdrift_bench.planted.llamacpp`.
"""

from __future__ import annotations

from kvdrift.engines.llamacpp.calls import Cache, Fed
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role


class Faultless:
    """Changes nothing: the clean twin of every fault, watched as closely."""

    def starting(self, cache: Cache, call: Fed) -> None:
        """See a call that is about to begin."""

    def watches(self, call: Fed) -> bool:
        """Whether each node of a call is computed by itself."""
        return False

    def before(self, node: Tensor, call: Fed) -> None:
        """See a node that is about to be computed."""

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        """See a node that was computed."""

    def copying(self, sequence: int) -> int:
        """The sequence that is copied."""
        return sequence

    def loading(self, state: bytes) -> bytes:
        """The bytes of a saved state that are read back."""
        return state
