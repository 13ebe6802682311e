"""One cached row that is another one for a single operation: the positive control in a cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kvdrift.engines.llamacpp.cells import Cells
from kvdrift.engines.llamacpp.ggml import Tensor
from kvdrift.engines.llamacpp.graph import cache_operand, role_of
from kvdrift.errors import CaptureError
from kvdrift.trace.model import Array
from kvdrift.vocabulary.facts import Plant


@dataclass(slots=True)
class LentRow:
    """Scales a row before a node reads it and puts it back behind that node."""

    _address: int = 0
    _rows: Array | None = None
    _before: Array | None = None

    def lend(self, node: Tensor, plant: Plant, cells: Cells, sequence: int) -> bool:
        """Scale the row of `plant.slot` in the memory that a node is about to read; False if it does not read it.

        Raises:
            CaptureError: the cache holds packed blocks, in which no row can be scaled.
        """
        role = role_of(node)
        if role is None or role.layer is None or role.layer != plant.layer:
            return False
        operand = cache_operand(node, role.kind, plant.site)
        if operand is None:
            return False
        tensor, is_transposed = operand
        if not tensor.is_plain:
            raise CaptureError(f"{plant.site} holds packed blocks, so no row of it can be scaled")
        slots, numbers = cells.of(role.layer, sequence)
        found = numbers[slots == plant.slot]
        if not len(found):
            return False
        values = tensor.values()[0]
        rows = values[..., int(found[0])] if is_transposed else values[:, int(found[0])]
        self._address, self._rows, self._before = node.address, rows, rows.copy()
        rows[...] = (rows.astype(np.float32) * np.float32(plant.factor)).astype(rows.dtype)
        return True

    def put_back(self, node: Tensor) -> None:
        """Put the row back, if this is the node that it was lent to."""
        if self._rows is not None and self._before is not None and node.address == self._address:
            self._rows[...] = self._before
            self._rows = self._before = None
