"""Minimum, maximum and mean of the probed attention rows, over the keys that a query sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, Site


@dataclass(slots=True)
class RunningStats:
    """Count, sum, minimum and maximum of values, in float64; a NaN stays in all but the count."""

    n: int = 0
    total: float = 0.0
    smallest: float = float("inf")
    largest: float = float("-inf")

    def add(self, values: NDArray[np.float64]) -> None:
        """Take in `values` of any shape."""
        if values.size:
            self.n += values.size
            self.total += float(values.sum())
            # np.minimum, unlike min, hands a NaN on
            self.smallest = float(np.minimum(self.smallest, values.min()))
            self.largest = float(np.maximum(self.largest, values.max()))

    def merge(self, other: RunningStats) -> None:
        """Take in everything that `other` has seen."""
        self.n += other.n
        self.total += other.total
        self.smallest = float(np.minimum(self.smallest, other.smallest))
        self.largest = float(np.maximum(self.largest, other.largest))

    @property
    def mean(self) -> float | None:
        """The mean; None of nothing."""
        return self.total / self.n if self.n else None


class AttentionPlace(NamedTuple):
    """Whose statistics they are; `layer` is -1 outside the layers."""

    mode: str
    pass_name: str
    site: str
    layer: int


@dataclass(slots=True)
class AttentionTable:
    """Statistics of attention rows by place."""

    by_place: dict[AttentionPlace, RunningStats] = field(default_factory=dict)

    def add(self, pair: PassPair) -> None:
        """Take in the attention rows [head, key] of both passes at the compared positions."""
        for trace in (pair.prefill, pair.decode):
            self._add(pair.mode, trace, pair.positions)

    def _add(self, mode: Mode, trace: Trace, positions: tuple[int, ...]) -> None:
        hidden: dict[tuple[int | None, int], NDArray[np.bool_]] = {}
        for record in trace.rows:
            if record.site not in ATTENTION_ROW_SITES:
                continue
            for index, position in enumerate(record.positions):
                if position not in positions:
                    continue
                values = record.values[index].astype(np.float64)
                place = (record.layer, position)
                if record.site is Site.ATTN_SCORES:
                    hidden[place] = np.isneginf(values)
                visible = values[~hidden[place]] if place in hidden else values.ravel()
                layer = -1 if record.layer is None else record.layer
                key = AttentionPlace(mode, trace.pass_name, str(record.site), layer)
                self.by_place.setdefault(key, RunningStats()).add(visible)
