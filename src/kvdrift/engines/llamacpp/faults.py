"""Faults that are planted into decode steps of llama.cpp, to measure whether an audit finds them.

Each acts on calls that feed one token and leaves longer ones, which are prefill, alone; `address` is where it begins.
Real bugs of these kinds are among those that the project's documentation lists for KV caches.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role
from kvdrift.engines.llamacpp.recorder import Cache, Fed
from kvdrift.sites import Site


class Faultless:
    """Changes nothing: the clean twin of every fault, watched as closely."""

    @property
    def address(self) -> tuple[int, Site] | None:
        """The layer and the site at which the fault begins, None if there is none."""
        return None

    def starting(self, cache: Cache, call: Fed) -> None:
        """See a call that is about to begin."""

    def before(self, node: Tensor, call: Fed) -> None:
        """See a node that is about to be computed."""

    def after(self, node: Tensor, role: Role, call: Fed) -> None:
        """See a node that was computed."""


class _StoredKeys(Faultless):
    """Base of faults in the stored keys of one layer."""

    layer: int

    @property
    def address(self) -> tuple[int, Site] | None:
        return (self.layer, Site.K_CACHE)

    def after(self, node: Tensor, role: Role, call: Fed) -> None:
        if len(call.members) != 1 or role.kind != "store_keys" or role.layer != self.layer:
            return
        cells = node.source(1)
        assert cells is not None
        newest = int(cells.values().ravel()[0])
        # The node is a view of the whole cache of this layer, one row a cell.
        rows = node.packed().reshape(node.shape[2], -1)
        node.write_packed(self.spoil(node, rows, newest).ravel())

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        """Return the rows [cell, byte] with the fault in them; `newest` is the cell of the fed token."""
        raise NotImplementedError


@dataclass
class RolledRows(_StoredKeys):
    """All keys move on by one cell: every token is attended to with the key of the one before it."""

    layer: int

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        rows[: newest + 1] = np.roll(rows[: newest + 1], 1, axis=0)
        return rows


@dataclass
class AliasedSlot(_StoredKeys):
    """Two cells share one row: the key of cell `source` is found in cell `target` as well."""

    layer: int
    source: int = 2
    target: int = 1

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        rows[self.target] = rows[self.source]
        return rows


@dataclass
class ScaledRow(_StoredKeys):
    """The key of the fed token is stored with a wrong scale."""

    layer: int
    factor: float = 1.05

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        values = node.ggml.to_float(node.kind, rows[newest], node.shape[3])
        rows[newest] = node.ggml.from_float(node.kind, values * np.float32(self.factor))
        return rows


@dataclass
class ShiftedPosition(Faultless):
    """The fed token is rotated to the position after its own, in every layer."""

    by: int = 1
    _shifted: Fed | None = field(default=None, repr=False)

    @property
    def address(self) -> tuple[int, Site] | None:
        return (0, Site.Q_ROPE)

    def before(self, node: Tensor, call: Fed) -> None:
        # All layers read one tensor of positions, which is complete before the graph starts: changed once a call.
        if len(call.members) != 1 or call is self._shifted or node.op != "ROPE":
            return
        positions = node.source(1)
        assert positions is not None
        positions.write(positions.values().astype(np.int32) + np.int32(self.by))
        self._shifted = call


@dataclass
class ShiftedCache(Faultless):
    """The cached tokens but the newest are moved by one position through the sequence API before each step."""

    by: int = 1

    @property
    def address(self) -> tuple[int, Site] | None:
        return (0, Site.K_CACHE)

    def starting(self, cache: Cache, call: Fed) -> None:
        if len(call.members) == 1:
            sequence, position = call.members[0]
            cache.shift(sequence, 0, position - 1, self.by)


@dataclass
class UnwrittenRow(_StoredKeys):
    """The key of the fed token is not stored: its cell is left empty."""

    layer: int

    def spoil(self, node: Tensor, rows: NDArray[np.uint8], newest: int) -> NDArray[np.uint8]:
        rows[newest] = 0
        return rows
