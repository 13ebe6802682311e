"""What is added to scores in 16 bits by one pass: told from another bias, and not taken for a difference of products.

A mask of the model's dtype that carries a bias by position (ALiBi; Press et al. 2022, arXiv:2108.12409) holds it in 16
bits. A decode kernel may take slope times distance in float32, or round another form of it. The bias of each pass is
what its scores have beyond the products of its own queries and keys. Where one of the two lies on the grid of 16 bits,
and they are, up to a constant of each head, one number to what such a grid rounds, decode's scores are compared with
prefill's bias in them. Products, and a bias that is off by more, stay as they were recorded.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.reads import reads_of
from kvdrift.pairing.turned import rows_by_place
from kvdrift.trace.model import Array, CacheRead, PassPair
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]

_KINDS: dict[str, type] = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
# How near a bias is to a number of 16 bits whose scores were summed in float32, beside it and the product.
_NEAR = 2.0**-20
# Fewer numbers may lie on the grid by chance.
_FEWEST = 4


@dataclass(slots=True)
class Biases:
    """Finds the bias of both passes of a pair, in the layers in which something is added to scores."""

    pair: PassPair
    _reads: dict[tuple[int, int], dict[int, CacheRead]] = field(default_factory=dict)

    def with_that_of_prefill(self, layer: int | None, position: int, rows: tuple[Array, Array] | None) -> Array | None:
        """Return decode's scores with prefill's bias in them, of `rows` [head, slot] of both passes; None where the
        biases are no roundings of each other, or nothing tells them."""
        native = self.pair.prefill.rung
        if native not in HALF or layer is None or rows is None or rows[0].dtype.itemsize <= 2:
            return None
        specs = [trace.attention.get(layer) for trace in (self.pair.prefill, self.pair.decode)]
        scale = next((spec.scale for spec in specs if spec is not None and spec.is_biased), None)
        if scale is None:
            return None
        raw = [self._products(side, layer, position, rows[0].shape[1]) for side in (0, 1)]
        if raw[0] is None or raw[1] is None or any(found.shape != rows[0].shape for found in raw if found is not None):
            return None
        first, second = (side.astype(np.float64) for side in rows)
        seen = np.isfinite(first) & np.isfinite(second) & np.isfinite(raw[0]) & np.isfinite(raw[1])
        if not np.array_equal(np.isfinite(first), np.isfinite(second)) or not seen.any(axis=1).all():
            return None
        products = [scale * np.where(seen, found, 0.0) for found in raw if found is not None]
        sides = [np.where(seen, side, 0.0) - made for side, made in zip((first, second), products, strict=True)]
        room = [_NEAR * (np.abs(bias) + np.abs(made)) for bias, made in zip(sides, products, strict=True)]
        if not any(_is_on_grid(bias[seen], of[seen], native) for bias, of in zip(sides, room, strict=True)):
            return None
        gap = sides[1] - sides[0]
        most = UNIT_ROUNDOFF[native] * (np.abs(sides[0]) + np.abs(sides[1])) + room[0] + room[1]
        least, largest = (
            np.max(np.where(seen, gap - most, -np.inf), axis=1, keepdims=True),
            np.min(np.where(seen, gap + most, np.inf), axis=1, keepdims=True),
        )
        if not bool((least <= largest).all()):
            return None
        constant = np.clip(0.0, least, largest)
        return np.asarray(np.where(seen, second - gap + constant, second).astype(rows[1].dtype))

    def _products(self, side: int, layer: int, position: int, n_slots: int) -> Floats | None:
        """The products of a pass's query with its keys [head, slot], NaN where it reads no such slot."""
        trace = (self.pair.prefill, self.pair.decode)[side]
        query = rows_by_place(trace, Site.Q_ROPE, (position,)).get((layer, position))
        read = self._keys(side, layer).get(position)
        if query is None or read is None or read.rows.ndim != 3 or query.size % read.rows.shape[2]:
            return None
        heads = query.astype(np.float64).reshape(-1, read.rows.shape[2])
        kept = read.slots < n_slots
        keys = read.rows[kept].astype(np.float64)
        if len(heads) % keys.shape[1]:
            return None
        found = np.full((len(heads), n_slots), np.nan)
        by_head = keys.repeat(len(heads) // keys.shape[1], axis=1)
        found[:, read.slots[kept]] = np.einsum("hd,shd->hs", heads, by_head)
        return found

    def _keys(self, side: int, layer: int) -> dict[int, CacheRead]:
        if (side, layer) not in self._reads:
            trace = (self.pair.prefill, self.pair.decode)[side]
            self._reads[side, layer] = reads_of(trace, layer, Site.K_CACHE)
        return self._reads[side, layer]


def _is_on_grid(bias: Floats, room: Floats, native: str) -> bool:
    """Whether all numbers are of 16 bits, and enough of them are not zero."""
    if int((np.abs(bias) > room).sum()) < _FEWEST:
        return False
    with np.errstate(over="ignore", invalid="ignore"):
        near = bias.astype(_KINDS[native]).astype(np.float64)
    return bool((np.abs(near - bias) <= room).all())


__all__ = ["Biases"]
