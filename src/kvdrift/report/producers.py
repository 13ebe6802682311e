"""The walk from a wrong value back to what it was computed from, as links into the table behind a map."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from kvdrift.verdict.charts import Cell
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import producers_of

# Places of the walk; the table goes on from there.
_MOST = 14


@dataclass(frozen=True, slots=True)
class Step:
    """A place of the walk, `depth` operations before the first failure, and what it was computed from."""

    depth: int
    cell: Cell
    inputs: tuple[Cell, ...]

    @property
    def is_origin(self) -> bool:
        """Whether it is beyond noise and none of its inputs is: the error is made here."""
        return self.cell.state == "beyond" and all(item.state != "beyond" for item in self.inputs)


def inputs_of_cells(cells: Sequence[Cell]) -> Mapping[Place, tuple[Cell, ...]]:
    """Return for each place the cells that it is computed from."""
    at = {(cell.place.layer, cell.place.site): cell for cell in cells}
    known = at.keys()
    return {
        cell.place: tuple(at[place] for place in producers_of(cell.place.layer, cell.place.site, known))
        for cell in cells
    }


def walk_back(cells: Sequence[Cell], first: Place) -> Iterator[Step]:
    """Yield the first failure, what it was computed from, what that was computed from, each place once."""
    inputs = inputs_of_cells(cells)
    by_place = {cell.place: cell for cell in cells}
    waiting = [(0, by_place[first])] if first in by_place else []
    met = {first}
    n_told = 0
    while waiting and n_told < _MOST:
        depth, cell = waiting.pop(0)
        n_told += 1
        yield Step(depth, cell, inputs[cell.place])
        for item in inputs[cell.place]:
            if item.place not in met:
                met.add(item.place)
                waiting.append((depth + 1, item))


def anchor(mode: str, place: Place) -> str:
    """Return the name of a row of the table behind a map: letters, digits, `-` and `_`."""
    layer = "x" if place.layer is None else str(place.layer)
    return f"{mode}-{layer}-{place.site}"
