"""One word for each column of a model: how far its tensors are apart in either mode, the worst of each."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from kvdrift.verdict.charts import Cell, cells_of
from kvdrift.verdict.judge import Judged
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import AFTER_LAYERS

State = Literal["equal", "within", "unknown", "beyond", "first"]
_WORST: tuple[State, ...] = ("equal", "within", "unknown", "beyond", "first")


@dataclass(frozen=True, slots=True)
class Mark:
    """A column: "embedding", the number of a layer, or "head" for what is behind the layers.

    `state` is "first" where the first failure lies, and else the worst of its tensors: "beyond" noise, "unknown" where
    no bound is known, "within" noise, or "equal" bits. `excess` is the largest drift over its bound, None without one.
    """

    name: str
    state: State
    excess: float | None


def strip_of(judged: Judged) -> tuple[Mark, ...]:
    """Return a mark for each column of which anything was compared, in forward order."""
    columns: dict[str, list[Cell]] = {}
    for mode in judged.measured.modes:
        for cell in cells_of(judged, mode):
            columns.setdefault(_column(cell.place), []).append(cell)
    first = judged.decision.first_failure
    at = None if first is None else _column(first.place)
    if at is not None:
        columns.setdefault(at, [])
    order = {"embedding": -1, "head": 1 << 30}
    names = sorted(columns, key=lambda name: order.get(name, int(name) if name.isdigit() else 0))
    return tuple(_mark(name, columns[name], name == at) for name in names)


def _column(place: Place) -> str:
    if place.layer is not None:
        return str(place.layer)
    return "head" if place.site in AFTER_LAYERS else "embedding"


def _mark(name: str, cells: Iterable[Cell], is_first: bool) -> Mark:
    cells = list(cells)
    known = [cell.excess for cell in cells if cell.excess is not None]
    worst: State = max((cell.state for cell in cells), key=_WORST.index, default="unknown")
    largest = math.nan if any(map(math.isnan, known)) else max(known, default=None)
    return Mark(name, "first" if is_first else worst, largest)
