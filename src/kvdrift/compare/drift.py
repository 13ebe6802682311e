"""The drift table: one row for every pair of values, with its figures; the value between comparing and judging."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from kvdrift.address import Address
from kvdrift.compare.align import Aligner, Pair, Unpaired
from kvdrift.compare.kernels import DriftFigures, hash_rows, measure
from kvdrift.errors import TraceError
from kvdrift.sites import Site
from kvdrift.trace.model import PassPair

NO_LAYER = -1  # layer of the sites outside the layers, in the table's integer column


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
        for values in aligner.pairs():
            self.rows.extend(_rows(pair, label, values, with_hashes))
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


def _rows(pair: PassPair, label: str, values: Pair, with_hashes: bool) -> Iterable[DriftRow]:
    keys = values.row_size if values.site is Site.ATTN_SCORES and values.row_size else None
    figures = measure(values.prefill, values.decode, free_shift_of=keys)
    slots = _slots(values, figures)
    nothing: list[str | None] = [None] * len(values.positions)
    first = hash_rows(values.prefill) if with_hashes else nothing
    second = hash_rows(values.decode) if with_hashes else nothing
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
            dtype=values.prefill.dtype.name,
            n_elements=values.prefill.shape[1],
            n_differ=int(figures.n_differ[i]),
            equal=bool(figures.equal[i]) and not lost and not values.is_rounded,
            max_abs=float(figures.max_abs[i]),
            max_ulp=float(figures.max_ulp[i]),
            rel_l2=float("inf") if lost else float(figures.rel_l2[i]),
            p99_abs=float(figures.p99_abs[i]),
            cosine=float(figures.cosine[i]),
            bias=float(figures.bias[i]),
            gain=float(figures.gain[i]),
            n_nonfinite=int(figures.n_nonfinite[i]),
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


def _slots(values: Pair, figures: DriftFigures) -> _SlotFigures:
    """Which cached position drifts most, how many rows differ in their bits, and how many of those are older."""
    if values.slots is None or bool(figures.equal.all()):
        return _SlotFigures()
    per_slot = measure(
        values.prefill.reshape(-1, values.row_size),
        values.decode.reshape(-1, values.row_size),
    )
    worst = int(values.slots[int(np.argmax(per_slot.rel_l2))])
    past = ~per_slot.equal & (values.slots < values.positions[0])
    return _SlotFigures(worst, int((~per_slot.equal).sum()), int(past.sum()))
