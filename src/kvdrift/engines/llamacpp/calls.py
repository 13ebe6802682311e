"""One call of llama_decode: what is fed, read and changed, and the bug that may be planted in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from kvdrift.engines.base import Sink
from kvdrift.engines.llamacpp.cells import Member
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Indices, Role
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Plant


class Cache(Protocol):
    """The cache of a context, as a fault may misuse it."""

    def shift(self, sequence: int, first: int, end: int, by: int) -> None: ...


class Fault(Protocol):
    """A planted bug: may change what a call computes, before it begins and node by node."""

    def starting(self, cache: Cache, call: Fed) -> None:
        """See a call that is about to begin; what the cache says of its cells can be changed."""
        ...

    def watches(self, call: Fed) -> bool:
        """Whether each node of a call is computed by itself. If not, `before` comes early: the nodes in front of one
        that nobody reads may not have been computed yet, and `after` comes for nodes with a role alone."""
        ...

    def before(self, node: Tensor, call: Fed) -> None:
        """See a node that is about to be computed; its operands can be changed."""
        ...

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        """See a node that was computed, before it is read; its value can be changed."""
        ...

    def copying(self, sequence: int) -> int:
        """Return the sequence that is really copied."""
        ...

    def loading(self, state: bytes) -> bytes:
        """Return the bytes that are really read back, of a state that was saved."""
        ...


@dataclass(frozen=True, slots=True)
class Probe:
    """The probed tokens of one sequence in one call: their positions, their rows among the fed tokens, their sink."""

    sequence: int
    positions: tuple[int, ...]
    rows: Indices
    sink: Sink


@dataclass(slots=True)
class Fed:
    """One call of llama_decode: the sequence and position of each fed token, and the rows whose logits are wanted.

    `replace` has layer inputs [fed token, hidden] by layer. `inputs`, where it is a dictionary, receives the same of
    what was computed; of what leaves the last layer llama.cpp computes the wanted rows alone, and the others are NaN.
    """

    members: Sequence[Member]
    outputs: Sequence[int]
    probes: Sequence[Probe] = ()
    replace: Mapping[int, Array] = field(default_factory=dict)
    plant: Plant | None = None
    inputs: dict[int, Array] | None = None
    kv_len: int | None = None
    kernels: set[str] = field(default_factory=set)
    was_planted: bool = False

    @property
    def is_read(self) -> bool:
        """Whether values of it are recorded, or changed by the positive control."""
        return bool(self.probes or self.plant)

    @property
    def is_observed(self) -> bool:
        return self.is_read or bool(self.replace) or self.inputs is not None
