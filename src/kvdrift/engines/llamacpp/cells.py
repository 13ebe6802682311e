"""Which token each cell of llama.cpp's caches holds, as the writes and the calls of the memory API say.

A layer has cells of its own. In a unified cache all sequences share them, and a cell may belong to several sequences;
otherwise each sequence has a stream of cells of its own, one behind the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Indices = NDArray[np.int64]
Member = tuple[int, int]  # sequence, position


class HeldToken(NamedTuple):
    """What a cell holds: the token at a position, of one or several sequences."""

    position: int
    owners: frozenset[int]


@dataclass(slots=True)
class Cells:
    """Cells by layer and number. `is_unified` says whether all sequences share one stream of them,
    of which there are `n_streams`, and `has_window` whether a layer sees a part of them.

    `sizes` are the cells of one stream, by layer, known from the first write. `shown_from` has, by layer and sequence,
    the first position that a window still showed to the last token fed.
    """

    is_unified: bool = True
    n_streams: int = 1
    has_window: bool = False
    by_layer: dict[int, dict[int, HeldToken]] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)
    shown_from: dict[tuple[int, int], int] = field(default_factory=dict)

    def store(self, layer: int, cells: Iterable[int], members: Sequence[Member], n_cells: int) -> None:
        """Note that the tokens of `members` were written into `cells` of a tensor of `n_cells`; what they held is gone.

        The cells of all streams lie behind each other in it.
        """
        known = self.by_layer.setdefault(layer, {})
        self.sizes[layer] = n_cells // self.n_streams
        for cell, (sequence, position) in zip(cells, members, strict=True):
            known[int(cell)] = HeldToken(position, frozenset({sequence}))

    def alias(self, layer: int, owner: int) -> None:
        """Note that a layer reads the cells of another one."""
        self.by_layer[layer] = self.by_layer.get(owner, {})
        self.sizes[layer] = self.sizes.get(owner, 0)

    def drop(self, sequence: int, first: int, stop: int | None = None) -> None:
        """Drop the tokens of a sequence from position `first` to `stop` - 1, or to its end."""
        for known in self._apart():
            for number, cell in list(known.items()):
                if sequence in cell.owners and first <= cell.position and (stop is None or cell.position < stop):
                    rest = cell.owners - {sequence}
                    if rest:
                        known[number] = HeldToken(cell.position, rest)
                    else:
                        del known[number]

    def move(self, sequence: int, first: int, by: int) -> None:
        """Give the tokens of a sequence from position `first` on other positions."""
        for known in self._apart():
            for number, cell in known.items():
                if sequence in cell.owners and cell.position >= first:
                    known[number] = HeldToken(cell.position + by, cell.owners)

    def share(self, source: int, target: int) -> None:
        """Let a sequence hold what another one holds: the same cells, or a copy of them in its own stream."""
        self.drop(target, 0)
        for layer, known in self._layers():
            for number, cell in list(known.items()):
                if source not in cell.owners:
                    continue
                if self.is_unified:
                    known[number] = HeldToken(cell.position, cell.owners | {target})
                else:
                    known[number + (target - source) * self.sizes[layer]] = HeldToken(
                        cell.position, frozenset({target})
                    )

    def load(self, saved: Cells, sequences: Iterable[int], *, visible_only: bool = False) -> None:
        """Take over what another cache held, in which nothing else was.

        llama.cpp reads a saved state back into the first cells, in the order of those that it was saved from. Of a
        single sequence it saves only what a window still shows (`visible_only`).
        """
        wanted = frozenset(sequences)
        for layer, known in saved.by_layer.items():
            size = self.sizes[layer] = saved.sizes[layer]
            here: dict[int, HeldToken] = {}
            for stream in [None] if self.is_unified else sorted(wanted):
                held = [
                    (number, HeldToken(cell.position, cell.owners & wanted))
                    for number, cell in sorted(known.items())
                    if cell.owners & (wanted if stream is None else {stream})
                    and not (visible_only and saved._is_hidden(layer, cell, wanted))
                ]
                first = 0 if stream is None else stream * size
                here.update({first + place: cell for place, (_, cell) in enumerate(held)})
            self.by_layer[layer] = here

    def of(self, layer: int, sequence: int) -> tuple[Indices, Indices]:
        """Return the positions of a sequence that are in the cache, in order, and their cells, counted from where the
        stream of the sequence begins."""
        known = self.by_layer.get(layer, {})
        held = sorted((cell.position, number) for number, cell in known.items() if sequence in cell.owners)
        table = np.array(held, dtype=np.int64).reshape(-1, 2)
        first = 0 if self.is_unified else sequence * self.sizes.get(layer, 0)
        return np.ascontiguousarray(table[:, 0]), np.ascontiguousarray(table[:, 1] - first)

    def _is_hidden(self, layer: int, cell: HeldToken, sequences: frozenset[int]) -> bool:
        return all(cell.position < self.shown_from.get((layer, s), 0) for s in cell.owners & sequences)

    def _layers(self) -> Iterable[tuple[int, dict[int, HeldToken]]]:
        """Each set of cells once, with a layer that has it: layers may read those of another one."""
        seen: set[int] = set()
        for layer, known in self.by_layer.items():
            if id(known) not in seen:
                seen.add(id(known))
                yield layer, known

    def _apart(self) -> Iterable[dict[int, HeldToken]]:
        return (known for _, known in self._layers())
