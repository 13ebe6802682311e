"""The drift table: one row for every pair of values, with its figures; the value between comparing and judging."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvdrift.compare.align import Aligner, Pair, Unpaired
from kvdrift.compare.kernels import Compared, DriftFigures, hash_rows, measure_all
from kvdrift.errors import TraceError
from kvdrift.trace.model import PassPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.sites import Site

NO_LAYER = -1  # layer of the sites outside the layers, in the table's integer column

# Elements of either side that are measured at once: enough that calling numpy costs little, and in float64 still little
# enough for the caches of a CPU.
_BATCH = 1 << 16


@dataclass(frozen=True, slots=True)
class DriftRow:
    """One pair. `layer` is NO_LAYER outside the layers; hashes are None away from the native dtype.

    `worst_slot` is the cached position whose row drifts most and `n_bad_slots` the rows whose bits differ, for cache
    reads only (-1 and 0 elsewhere); `n_bad_past` counts those of tokens before this one, which decode did
    not write. `n_lost` counts keys that one side has and the other lacks.
    """

    mode: str
    rung: str
    prompt: str
    token_id: int
    position: int
    layer: int
    site: str
    dtype: str
    n_elements: int
    n_differ: int
    equal: bool
    max_abs: float
    max_ulp: float
    rel_l2: float
    p99_abs: float
    cosine: float
    bias: float
    gain: float
    n_nonfinite: int
    n_lost: int
    worst_slot: int
    n_bad_slots: int
    n_bad_past: int
    sha256_prefill: str | None
    sha256_decode: str | None

    @property
    def address(self) -> Address:
        return Address(self.prompt, self.position, None if self.layer == NO_LAYER else self.layer, Site(self.site))

    @property
    def key(self) -> tuple[str, int, int, str]:
        """What identifies the address within one mode and rung."""
        return (self.prompt, self.position, self.layer, self.site)


@dataclass(slots=True)
class DriftTable:
    """All pairs of a run, and the values that found no partner."""

    rows: list[DriftRow] = field(default_factory=list)
    unpaired: list[tuple[str, str, Unpaired]] = field(default_factory=list)  # mode, rung, value

    def add(self, pair: PassPair, label: str, *, with_hashes: bool) -> None:
        """Compare a pair of passes and append its rows under the mode `label`."""
        aligner = Aligner(pair)
        for batch in batches(aligner.pairs()):
            self.rows.extend(_rows(pair, label, batch, with_hashes))
        self.unpaired.extend((label, pair.prefill.rung, value) for value in aligner.unpaired)

    def select(self, mode: str, rung: str) -> dict[tuple[str, int, int, str], DriftRow]:
        """Return the rows of one mode and rung by address key."""
        return {row.key: row for row in self.rows if row.mode == mode and row.rung == rung}

    def write(self, path: Path) -> None:
        """Write the table as parquet."""
        columns = {f.name: [getattr(row, f.name) for row in self.rows] for f in fields(DriftRow)}
        pq.write_table(pa.table(columns, schema=_SCHEMA), path, compression="zstd")

    @classmethod
    def read(cls, path: Path) -> DriftTable:
        """Read a table that `write` wrote.

        Raises:
            TraceError: the file is missing, damaged or has other columns.
        """
        try:
            data = pq.read_table(path, schema=_SCHEMA).to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise TraceError(f"cannot read the drift table {path}: {error}") from error
        return cls([DriftRow(**row) for row in data])


_ARROW = {"str": pa.string(), "str | None": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
_SCHEMA = pa.schema([(f.name, _ARROW[str(f.type)]) for f in fields(DriftRow)])


def batches(pairs: Iterable[Pair]) -> Iterator[list[Pair]]:
    """Yield the pairs in their order, as many at a time as are worth one computation and take little memory."""
    batch: list[Pair] = []
    size = 0
    for pair in pairs:
        batch.append(pair)
        size += pair.prefill.size
        if size >= _BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def figures_of(batch: Sequence[Pair]) -> list[DriftFigures]:
    """Return the figures of each pair; scores may be shifted by a constant for each head."""
    return measure_all(
        [
            Compared(
                values.prefill,
                values.decode,
                values.row_size if values.site is Site.ATTN_SCORES and values.row_size else None,
            )
            for values in batch
        ]
    )


def _rows(pair: PassPair, label: str, batch: Sequence[Pair], with_hashes: bool) -> Iterator[DriftRow]:
    measured = figures_of(batch)
    of_slots = _slots(batch, measured)
    for values, figures, slots in zip(batch, measured, of_slots, strict=True):
        yield from _rows_of_pair(pair, label, values, figures, slots, with_hashes)


def _rows_of_pair(
    pair: PassPair, label: str, values: Pair, figures: DriftFigures, slots: _SlotFigures, with_hashes: bool
) -> Iterator[DriftRow]:
    nothing: list[str | None] = [None] * len(values.positions)
    first = hash_rows(values.prefill) if with_hashes else nothing
    second = hash_rows(values.decode) if with_hashes else nothing
    dtype = values.prefill.dtype.name
    column = {field.name: getattr(figures, field.name).tolist() for field in fields(DriftFigures)}
    for i, position in enumerate(values.positions):
        # A key or slot that only one side has is a difference that no norm over the common ones can show.
        lost = values.n_lost > 0
        yield DriftRow(
            mode=label,
            rung=pair.prefill.rung,
            prompt=pair.prefill.prompt,
            token_id=pair.prefill.tokens[position],
            position=position,
            layer=NO_LAYER if values.layer is None else values.layer,
            site=str(values.site),
            dtype=dtype,
            n_elements=values.prefill.shape[1],
            n_differ=column["n_differ"][i],
            equal=column["equal"][i] and not lost and not values.is_rounded,
            max_abs=column["max_abs"][i],
            max_ulp=column["max_ulp"][i],
            rel_l2=float("inf") if lost else column["rel_l2"][i],
            p99_abs=column["p99_abs"][i],
            cosine=column["cosine"][i],
            bias=column["bias"][i],
            gain=column["gain"][i],
            n_nonfinite=column["n_nonfinite"][i],
            n_lost=values.n_lost,
            worst_slot=slots.worst,
            n_bad_slots=slots.n_bad,
            n_bad_past=slots.n_bad_past,
            sha256_prefill=first[i],
            sha256_decode=second[i],
        )


@dataclass(frozen=True, slots=True)
class _SlotFigures:
    worst: int = -1
    n_bad: int = 0
    n_bad_past: int = 0


def _slots(batch: Sequence[Pair], measured: Sequence[DriftFigures]) -> list[_SlotFigures]:
    """Which cached position drifts most, how many rows differ in their bits, and how many of those are older."""
    found = [_SlotFigures()] * len(batch)
    differing = [
        (index, values, values.slots)
        for index, (values, figures) in enumerate(zip(batch, measured, strict=True))
        if values.slots is not None and not figures.equal.all()
    ]
    by_slot = measure_all(
        [
            Compared(values.prefill.reshape(-1, values.row_size), values.decode.reshape(-1, values.row_size))
            for _, values, _ in differing
        ]
    )
    for (index, values, slots), figures in zip(differing, by_slot, strict=True):
        past = ~figures.equal & (slots < values.positions[0])
        worst = int(slots[int(np.argmax(figures.rel_l2))])
        found[index] = _SlotFigures(worst, int((~figures.equal).sum()), int(past.sum()))
    return found
