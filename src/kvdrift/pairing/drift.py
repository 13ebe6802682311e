"""The drift table: every pair of values of a run with its figures; the value between comparing and judging."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

import numpy as np

from kvdrift.pairing.align import Aligner, Unpaired
from kvdrift.pairing.angles import angles_off
from kvdrift.pairing.files import read_blocks, write_blocks
from kvdrift.pairing.folded import Fold, Folds
from kvdrift.pairing.measure import compare, compare_drifts
from kvdrift.pairing.merges import Merges
from kvdrift.pairing.rows import Block, Bools, DriftRow, Floats, Ints, Rows, block_of, check_range, is_in_range, keys_at
from kvdrift.pairing.scales import Scales
from kvdrift.pairing.turned import IN_FRAMES
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.sites import Site


@dataclass(slots=True)
class DriftTable:
    """All pairs of a run, a block for each comparison of two passes, and the values that found no partner.

    Blocks are appended and never changed, so that the pairs of a mode and rung are put together once.
    """

    blocks: list[Block] = field(default_factory=list)
    unpaired: list[tuple[str, str, Unpaired]] = field(default_factory=list)  # mode, rung, value
    # By mode and rung: the layers in which queries and keys of one pass were turned back into the frame of the other,
    # and what is left there.
    turned: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    # By mode: the layers in which decode holds a part of the scale in its queries or keys.
    folded: dict[str, dict[int, Fold]] = field(default_factory=dict)
    # By mode: the places whose rows decode keeps by scales of their own.
    rescaled: dict[str, set[tuple[int, Site]]] = field(default_factory=dict)
    # By mode: the norms whose gains decode multiplies into the weights behind them; by rung, these gains.
    gained: dict[str, set[tuple[int | None, Site]]] = field(default_factory=dict)
    gains: dict[str, dict[tuple[int | None, Site], Floats]] = field(default_factory=dict)
    # By mode: the layers in which one pass turns queries and keys by a table of float32, and by what rows are off.
    angles: dict[str, dict[int, float]] = field(default_factory=dict)
    # By mode: by what the scores of one pass are multiplied at float64.
    scales: dict[str, Scales] = field(default_factory=dict)
    # By mode: where one pass merges parts of attention that are kept in 16 bits.
    merges: dict[str, Merges] = field(default_factory=dict)
    # By mode: where both passes attend with operands of 8 bits.
    of_8_bits: dict[str, Merges] = field(default_factory=dict)
    _prompts: dict[str, int] = field(default_factory=dict, repr=False)
    _selected: dict[tuple[str, str], tuple[int, Rows]] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return sum(map(len, self.blocks))

    @classmethod
    def of(cls, rows: Iterable[DriftRow]) -> DriftTable:
        """Return a table of these pairs."""
        return cls([block_of([*alike]) for _, alike in groupby(rows, key=lambda row: (row.mode, row.rung, row.prompt))])

    def add(self, pair: PassPair, label: str, *, with_hashes: bool) -> Block:
        """Compare a pair of passes, append its block under the mode `label` and return it."""
        aligner = Aligner(pair, gains=self.gains.get(pair.prefill.rung, {}))
        return self._append(aligner, label, compare(aligner, label, with_hashes=with_hashes))

    def add_drifts(self, pair: PassPair, label: str) -> Block:
        """Do as `add`, with no columns but those of `DRIFTS`: such a table can be selected from, and not be written."""
        aligner = Aligner(pair)
        return self._append(aligner, label, compare_drifts(aligner, label))

    def _append(self, aligner: Aligner, label: str, block: Block) -> Block:
        pair = aligner.pair
        check_range(block)
        self.blocks.append(block)
        self.unpaired.extend((label, pair.prefill.rung, value) for value in aligner.unpaired)
        known = self.turned.setdefault((label, pair.prefill.rung), {})
        for layer, left in aligner.turns.layers.items():
            known[layer] = max(left, known.get(layer, 0.0))
        self.folded.setdefault(label, {}).update(aligner.folds.by_layer)
        self.rescaled.setdefault(label, set()).update(aligner.scales)
        self.gained.setdefault(label, set()).update(aligner.gains)
        if len(pair.positions) > 1:
            self.gains.setdefault(pair.prefill.rung, {}).update(aligner.gains)
        return block

    def note_angles(self, pair: PassPair, label: str) -> None:
        """Note where rotations of one pass are rounded to float32 (`kvdrift.pairing.angles`)."""
        known = self.angles.setdefault(label, {})
        for layer, off in angles_off(pair).items():
            known[layer] = max(off, known.get(layer, 0.0))

    def select(self, mode: str, rung: str) -> Rows:
        """Return the pairs of one mode and rung; of several at one address the last, in the place of the first."""
        blocks = [block for block in self.blocks if (block.mode, block.rung) == (mode, rung)]
        known = self._selected.get((mode, rung))
        if known is not None and known[0] == _stamp(blocks):
            return known[1]
        rows = _without_repeats(self._rows(blocks))
        self._selected[mode, rung] = _stamp(blocks), rows
        return rows

    def where(self, chosen: Callable[[Block], bool]) -> Rows:
        """Return the pairs of the blocks that `chosen` accepts, in the order in which they were measured."""
        return self._rows([block for block in self.blocks if chosen(block)])

    def in_frames(self, mode: str) -> set[Place]:
        """Return the places whose rows were turned back, or divided: a fault of one of them changes how all are."""
        layers = {layer for (label, _), found in self.turned.items() if label == mode for layer in found}
        folded = {Place(*place) for place in Folds(self.folded.get(mode, {})).places}
        rescaled = {Place(*place) for place in self.rescaled.get(mode, ())}
        gained = {Place(*place) for place in self.gained.get(mode, ())}
        return {Place(layer, site) for layer in layers for site in IN_FRAMES} | folded | rescaled | gained

    def unplantable(self, mode: str) -> set[Place]:
        """Return the places at which a fault would change how rows are compared: those of `in_frames`, and the keys by
        which scores stay the same under the factors of queries."""
        return self.in_frames(mode) | {Place(layer, Site.K_CACHE) for layer in self.folded.get(mode, {})}

    def rows_of(self, block: Block) -> Rows:
        """Return the pairs of one block."""
        return self._rows([block])

    def _rows(self, blocks: Sequence[Block]) -> Rows:
        for block in self.blocks:
            self._prompts.setdefault(block.prompt, len(self._prompts))
        return Rows(blocks, self._prompts)

    def lost(self, mode: str, rung: str) -> Ints:
        """Return the keys of the addresses that one side has and that could not be compared."""
        found = [value.address for label, at, value in self.unpaired if (label, at) == (mode, rung)]
        return keys_at(
            [address for address in found if address.prompt in self._prompts and is_in_range(address)], self._prompts
        )

    def part(self, prompt: str) -> DriftTable:
        """Return the table of one prompt."""
        return DriftTable(
            [block for block in self.blocks if block.prompt == prompt],
            [value for value in self.unpaired if value[2].prompt == prompt],
            self.turned,
            self.folded,
            self.rescaled,
            self.gained,
            self.gains,
            self.angles,
            self.scales,
            self.merges,
        )

    def forget(self, mode: str) -> None:
        """Drop what was measured in one mode."""
        self.blocks = [block for block in self.blocks if block.mode != mode]
        self.unpaired = [value for value in self.unpaired if value[0] != mode]

    def replace_block(self, block: Block, **columns: Floats | Ints | Bools) -> Block:
        """Put a block with other columns in the place of `block`, and return it."""
        index = next(i for i, known in enumerate(self.blocks) if known is block)
        self.blocks[index] = replace(block, columns={**block.columns, **columns})
        return self.blocks[index]

    @property
    def rungs(self) -> set[str]:
        """The rungs at which something was compared."""
        return {block.rung for block in self.blocks if len(block)}

    def __iter__(self) -> Iterator[DriftRow]:
        return iter(self._rows(self.blocks))

    def write(self, directory: Path) -> Path:
        """Write the table into `directory` and return the file: drift.parquet, or drift.csv.gz without pyarrow."""
        return write_blocks(self.blocks, directory)

    @classmethod
    def read(cls, path: Path) -> DriftTable:
        """Read a file that `write` wrote.

        Raises:
            TraceError: the file is missing, damaged or has other columns.
            EngineUnavailable: it is a parquet file, and pyarrow is not installed.
        """
        return cls(read_blocks(path))


def _stamp(blocks: Sequence[Block]) -> int:
    return hash(tuple(map(id, blocks)))


def _without_repeats(rows: Rows) -> Rows:
    known, first = np.unique(rows.key, return_index=True)
    if len(known) == len(rows):
        return rows
    last = len(rows) - 1 - np.unique(rows.key[::-1], return_index=True)[1]
    return rows.where(last[np.argsort(first)])
