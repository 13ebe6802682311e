"""Scores of a token beside the slots of their keys, and how far those of two passes lie apart."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvdrift.trace.model import Slots, Trace
from kvdrift.vocabulary.sites import Site

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class SlotScores:
    """The scores [head, key] of a token, and the slot of each key."""

    values: Floats
    slots: Slots

    @property
    def seen(self) -> Slots:
        """The slots that some head attends to."""
        found: Slots = self.slots[~(self.values == -np.inf).all(axis=0)]
        return found

    def distance(self, other: SlotScores) -> float:
        """Return how far the scores of the same keys lie apart, up to a constant for each head, relative to these in
        the 2-norm; infinity where the keys are others, or a score that is seen is not finite."""
        mine, theirs = (rows.values[:, np.isin(rows.slots, rows.seen)] for rows in (self, other))
        orders = np.argsort(self.seen, kind="stable"), np.argsort(other.seen, kind="stable")
        if mine.shape != theirs.shape or not np.array_equal(self.seen[orders[0]], other.seen[orders[1]]):
            return np.inf
        first, second = mine[:, orders[0]], theirs[:, orders[1]]
        if not (np.isfinite(first).all() and np.isfinite(second).all()):
            return np.inf
        apart = (second - first) - (second - first).mean(axis=1, keepdims=True)
        off, long = float(np.linalg.norm(apart)), float(np.linalg.norm(first))
        return off / long if long > 0.0 else (0.0 if off == 0.0 else np.inf)


def scores_by_place(trace: Trace, places: Container[tuple[int, int]]) -> dict[tuple[int, int], SlotScores]:
    """Return the scores that a trace recorded at some (layer, position)."""
    return {
        (record.layer, position): SlotScores(record.values[index].astype(np.float64), record.slots)
        for record in trace.rows
        if record.site is Site.ATTN_SCORES and record.layer is not None and record.slots is not None
        for index, position in enumerate(record.positions)
        if (record.layer, position) in places and record.values[index].ndim == 2
    }


__all__ = ["SlotScores", "scores_by_place"]
