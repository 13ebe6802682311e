"""How something is planted in llama.cpp: around one node of a decode step, through `Spot` alone, which counts it.

A change is a generator: what stands before its `yield` happens before the node is computed, what stands behind it
before the node is read. Operands, parameters and rows that were lent are put back before the next node is computed, so
that a step leaves no trace in those that follow.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, wraps
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.engines.llamacpp.calls import Fed
from kvdrift.engines.llamacpp.faults import Faultless
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import Role, cache_layer, role_of
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array
from kvdrift_bench.planted.facts import Tally

Floats = NDArray[np.float32]

_NUMBERED = re.compile(r"(\w+)-(\d+)( .*)?")
_CACHE = re.compile(r"cache_[kv]_l(\d+)( .*)?")
_WEIGHTS = re.compile(r"blk\.(\d+)\.\w+\.\w+")


@dataclass
class Spot:
    """One node of a decode step that is about to be computed, and the only ways in which a change may touch it."""

    node: Tensor
    call: Fed
    tally: Tally
    _undo: list[Callable[[], None]] = field(default_factory=list)

    @property
    def position(self) -> int:
        """The position of the fed token; with one sequence to a cache also the number of its cell."""
        return self.call.members[0][1]

    @cached_property
    def role(self) -> Role | None:
        return role_of(self.node)

    @property
    def kind(self) -> str | None:
        """The kind of the node's role, None if it has none."""
        return None if self.role is None else self.role.kind

    @cached_property
    def base(self) -> str:
        """The node's name without its layer."""
        found = _NUMBERED.fullmatch(self.node.name)
        return found[1] if found else self.node.name

    @cached_property
    def layer(self) -> int | None:
        """The layer that the node belongs to, None if it does not say."""
        found = _NUMBERED.fullmatch(self.node.name)
        if found:
            return int(found[2])
        found = _CACHE.fullmatch(self.node.name)
        if found:
            return int(found[1])
        operand = self.node.source(1 if self.node.op == "FLASH_ATTN_EXT" else 0)
        if operand is None:
            return None
        weights = _WEIGHTS.fullmatch(operand.name)
        return int(weights[1]) if weights else cache_layer(operand)

    def source(self, index: int) -> Tensor:
        """Return an operand that the operation must have."""
        found = self.node.source(index)
        if found is None:
            raise ValueError(f"{self.node.name} ({self.node.op}) has no operand {index}")
        return found

    def floats(self) -> Floats:
        """Return a copy of the values of the node, which was computed."""
        return np.asarray(self.node.values().astype(np.float32))

    @property
    def mask(self) -> Tensor | None:
        """The mask of an attention operation, None for any other node."""
        index = {"softmax": 1, "flash": 3}.get(self.kind or "")
        return None if index is None else self.node.source(index)

    @property
    def keys(self) -> CacheRows | None:
        """The cached keys, if this node reads them."""
        if self.kind == "scores" and self.base == "kq":
            return CacheRows(self, self.source(0), transposed=False)
        return CacheRows(self, self.source(1), transposed=False) if self.kind == "flash" else None

    @property
    def values(self) -> CacheRows | None:
        """The cached values, if this node reads them."""
        if self.kind == "values":
            return CacheRows(self, self.source(0), transposed=True)
        return CacheRows(self, self.source(2), transposed=False) if self.kind == "flash" else None

    def write(self, values: Array) -> None:
        """Put other values, in any shape of the same size, into the node, which was computed."""
        self._change(self.node.values(), values)

    def lend(self, tensor: Tensor, values: Array) -> None:
        """Put other values into a plain tensor until the node is read."""
        self._lend_array(tensor.values(), values)

    def lend_parameter(self, index: int, value: float) -> None:
        """Let the operation have another parameter until the node is read."""
        self._lend_bits(index, int(np.float32(value).view(np.int32)))

    def lend_integer(self, index: int, value: int) -> None:
        """Let the operation have another parameter that is an integer."""
        self._lend_bits(index, value)

    def lend_operand(self, index: int, tensor: Tensor | None) -> None:
        """Let the operation have another operand, None for none."""
        struct = self.node.struct
        before = struct.src[index]
        self.tally.note(changed=before != (None if tensor is None else tensor.address))
        self._undo.append(lambda: struct.src.__setitem__(index, before))
        struct.src[index] = None if tensor is None else tensor.address

    def put_back(self) -> None:
        """Return what was lent."""
        while self._undo:
            self._undo.pop()()

    def _lend_bits(self, index: int, bits: int) -> None:
        parameters = self.node.struct.op_params
        before = parameters[index]
        self.tally.note(changed=before != bits)
        self._undo.append(lambda: parameters.__setitem__(index, before))
        parameters[index] = bits

    def _lend_array(self, memory: NDArray[Any], values: Array) -> None:
        before = memory.copy()
        self._undo.append(lambda: memory.__setitem__(..., before))
        self._change(memory, values)

    def _change(self, memory: NDArray[Any], values: Array) -> None:
        before = memory.copy()
        memory[...] = np.asarray(values).reshape(memory.shape).astype(memory.dtype)
        self.tally.note(changed=before.tobytes() != memory.tobytes())


@dataclass(frozen=True)
class CacheRows:
    """The cells of one layer's keys or values, as an attention operation reads them."""

    spot: Spot
    operand: Tensor
    transposed: bool

    def read(self) -> Floats:
        """Return [cell, kv head, dim] of the cells up to the newest, as float32."""
        return self._first(self.spot.position + 1)

    def _first(self, n_cells: int) -> Floats:
        if self.operand.is_plain:
            return np.asarray(self._plain().astype(np.float32).transpose(1, 0, 2)[:n_cells])
        return np.asarray(self.operand.rows_at(2, np.arange(n_cells))[0].transpose(1, 0, 2))

    def lend(self, rows: Floats) -> None:
        """Put rows [cell, kv head, dim] from cell 0 on, until the node is read, rounded as the cache rounds."""
        new = rows.transpose(1, 0, 2)
        if self.operand.is_plain:
            self.spot._lend_array(self._plain()[:, : len(rows)], new)
            return
        memory = self.operand.packed_rows()[0][:, : len(rows)]
        packed = self.operand.ggml.from_float(self.operand.kind, new).reshape(memory.shape)
        # A row that stays as it was is not packed again: that alone can change it.
        same = (self._first(len(rows)).transpose(1, 0, 2) == new).all(axis=-1, keepdims=True)
        self.spot._lend_array(memory, np.where(same, memory, packed))

    def _plain(self) -> NDArray[Any]:
        """Return a view [kv head, cell, dim] of the memory."""
        view: NDArray[Any] = self.operand.values()[0]
        return view.transpose(0, 2, 1) if self.transposed else view


Change = Callable[[Spot], Iterator[None]]


def in_one_layer(change: Change) -> Change:
    """Make a change in the layer that faults of one layer are planted in, and in no other."""

    @wraps(change)
    def here(spot: Spot) -> Iterator[None]:
        if spot.layer == spot.tally.fault_layer:
            yield from change(spot)

    return here


def lend_factor(spot: Spot, index: int, factor: float) -> None:
    """Let a parameter of the operation be larger by a factor until the node is read."""
    spot.lend_parameter(index, factor * spot.node.parameter(index))


class Counting(Faultless):
    """What is planted where a change around nodes is not enough: made anew for each planting, and counts in `tally`."""

    def __init__(self, tally: Tally) -> None:
        self.tally = tally


class Hook(Faultless):
    """Makes one change on every decode step of a context."""

    def __init__(self, change: Change, tally: Tally) -> None:
        self._change, self._tally = change, tally
        self._running: tuple[Spot, Iterator[None]] | None = None
        self._lent: Spot | None = None

    def watches(self, call: Fed) -> bool:
        return len(call.members) == 1 and call.members[0][1] > 0

    def before(self, node: Tensor, call: Fed) -> None:
        """Return what was lent to the node before, and begin the change if it is for this one."""
        self._running = None
        if self._lent is not None:
            self._lent.put_back()
            self._lent = None
        if not self.watches(call):
            return
        spot = Spot(node, call, self._tally)
        change = self._change(spot)
        self._lent = spot
        if next(change, self) is None:
            self._running = spot, change

    def after(self, node: Tensor, role: Role | None, call: Fed) -> None:
        """Go on with a change that has begun."""
        if node.op == "SET_ROWS" and role is not None and self.watches(call):
            self._check_cell(node, call)
        if self._running is None:
            return
        spot, change = self._running
        self._running = None
        if spot.node.address == node.address:
            next(change, None)

    def _check_cell(self, node: Tensor, call: Fed) -> None:
        """Refuse a cache in which a token is not where its position says: other cells than meant would be changed."""
        cells = node.source(1)
        found = None if cells is None else int(cells.values().ravel()[0])
        position = call.members[0][1]
        if found != position:
            raise CaptureError(f"the token at position {position} was stored in cell {found}; plant one sequence alone")
