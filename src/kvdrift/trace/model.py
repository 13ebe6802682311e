"""One recorded pass in memory: what was captured, for which tokens, and proof of the route that it took.

Knows arrays and addresses; knows nothing of engines, files or drift.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray

from kvdrift.errors import AlignmentError
from kvdrift.trace.mapped import Pages
from kvdrift.trace.ranks import RankPart, SumCheck
from kvdrift.vocabulary.facts import AttentionSpec, Call
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.sites import CACHE_SITES, Site

PassName = Literal["prefill", "decode"]
Array = NDArray[np.generic]
Slots = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class RowRecord:
    """Values of one site at some probed positions.

    `values` is [position, ...]. For attention rows it is [position, head, key], and `slots` [key] says which logical
    position each key column holds; a masked key is -inf in scores and 0 in probabilities.
    """

    layer: int | None
    site: Site
    positions: tuple[int, ...]
    values: Array
    slots: Slots | None = None
    part: RankPart | None = None  # of a trace that is being written; on reading parts are joined


@dataclass(frozen=True, slots=True)
class CacheRecord:
    """The rows of K or V that one attention call read.

    `slots` [n] gives the logical position of every row that was read. Rows are kept once: `stored` indexes into
    `slots`, `rows` [len(stored), head, dim] holds those, and every other row equals, byte for byte, the row of the
    same slot in the previous record of the same layer and site.
    """

    layer: int
    site: Site
    positions: tuple[int, ...]
    slots: Slots
    stored: Slots
    rows: Array
    part: RankPart | None = None


@dataclass(frozen=True, slots=True)
class CacheRead:
    """A CacheRecord with all its rows: `rows` [slot, head, dim], `slots` [slot] their logical positions."""

    layer: int
    site: Site
    positions: tuple[int, ...]
    slots: Slots
    rows: Array


# The note of a product whose reference came out of its own module. Such a reference is not above the two passes: where
# they differ, it says that they do, and not which of them is off.
MEASURED = "its matrix was measured, with unit rows that were sent through it"


@dataclass(slots=True)
class ProductRecord:
    """A product with weights that the model holds, beside what it is in exact arithmetic on the same operands.

    Attributes:
        layer: None outside the layers.
        site: where its values belong; several products may share one.
        name: of the module, within its layer, or in the model where it is outside the layers.
        positions: the tokens, as in a RowRecord.
        values: [position, feature] as the pass computed them; None where they are those recorded of `site`.
        reference: [position, feature], W x + b in float64, kept in float32; None while it is not yet computed.
        spread: [position, feature], the root of the sum of the squares of the terms of each result: what its partial
            sums are as large as, whatever cancels in the end.
        note: why the weight cannot be known, where there is no reference; else how the operand is rounded on the fly,
            where it is, or that the weight was measured.
    """

    layer: int | None
    site: Site
    name: str
    positions: tuple[int, ...]
    values: Array | None = None
    reference: Array | None = None
    spread: Array | None = None
    note: str | None = None


@dataclass(slots=True)
class Trace:
    """One pass over one sequence at one dtype.

    `tokens` are all the token ids of the sequence; position p belongs to tokens[p].
    """

    prompt: str
    pass_name: PassName
    label: str  # mode of a decode pass, or the role of an extra one such as "control"
    rung: str  # dtype name, such as "bfloat16"
    tokens: tuple[int, ...]
    calls: list[Call] = field(default_factory=list)
    rows: list[RowRecord] = field(default_factory=list)
    cache: list[CacheRecord] = field(default_factory=list)
    attention: dict[int, AttentionSpec] = field(default_factory=dict)
    products: list[ProductRecord] = field(default_factory=list)
    # Layer inputs [token, ...] of all fed tokens by layer number, and what leaves the last layer at n_layers; an engine
    # fills it where it is not None. Not saved.
    inputs: dict[int, Array] | None = field(default=None, repr=False)
    pages: Pages | None = field(default=None, repr=False)  # of a trace that was read: where its values lie
    # Of records that ranks hold in parts: which parts, what their sums showed, and the addends by part and position.
    parts: dict[tuple[int | None, Site], tuple[RankPart, ...]] = field(default_factory=dict, repr=False)
    sums: list[SumCheck] = field(default_factory=list, repr=False)
    addends: dict[tuple[int | None, Site], dict[tuple[str, int], Array]] = field(default_factory=dict, repr=False)
    _last_read: dict[tuple[int, Site], CacheRead] = field(default_factory=dict, repr=False)

    def add_rows(
        self,
        layer: int | None,
        site: Site,
        positions: tuple[int, ...],
        values: Array,
        slots: Slots | None = None,
    ) -> None:
        """Record `values` [position, ...] of a site."""
        if values.shape[0] != len(positions):
            raise AlignmentError(
                f"{self.prompt} / layer {layer} / {site}: {values.shape[0]} rows for {len(positions)} positions"
            )
        self.rows.append(RowRecord(layer, site, positions, values, slots))

    def add_cache_read(self, layer: int, site: Site, positions: tuple[int, ...], slots: Slots, rows: Array) -> None:
        """Record the `rows` [slot, head, dim] that attention read; unchanged rows are kept only once."""
        if site not in CACHE_SITES or rows.shape[0] != slots.shape[0]:
            raise AlignmentError(f"{self.prompt} / layer {layer} / {site}: {rows.shape[0]} rows for {len(slots)} slots")
        previous = self._last_read.get((layer, site))
        stored = np.arange(len(slots)) if previous is None else _changed_rows(previous, slots, rows)
        self.cache.append(CacheRecord(layer, site, positions, slots, stored, np.ascontiguousarray(rows[stored])))
        self._last_read[layer, site] = CacheRead(layer, site, positions, slots, rows)

    def add_attention(self, layer: int, spec: AttentionSpec) -> None:
        """Note how a layer attends; a later call of the same pass says the same or is a fault that replay will see.

        That there is more to it than is known may come to light while the call runs.
        """
        known = self.attention.setdefault(layer, spec)
        if spec.is_biased and not known.is_biased:
            self.attention[layer] = msgspec.structs.replace(known, is_biased=True)

    def exact_products(self) -> Iterator[tuple[ProductRecord, Array, Array, Array]]:
        """Yield every product that was also computed exactly, with its values, reference and spread, all [position,
        feature]; one whose values were not recorded is left out."""
        rows: dict[tuple[int | None, Site], dict[int, Array]] = {}
        wanted = {(item.layer, item.site) for item in self.products if item.values is None}
        for record in self.rows:
            if (record.layer, record.site) in wanted:
                known = rows.setdefault((record.layer, record.site), {})
                known |= dict(zip(record.positions, record.values, strict=True))
        for item in self.products:
            if item.reference is None or item.spread is None:
                continue
            values = item.values
            if values is None:
                known = rows.get((item.layer, item.site), {})
                if not all(position in known for position in item.positions):
                    continue
                values = np.stack([known[position].reshape(-1) for position in item.positions])
            if values.shape == item.reference.shape:
                yield item, values, item.reference, item.spread

    def cache_reads(self, layer: int | None = None) -> Iterator[CacheRead]:
        """Yield every cache read with all its rows, in the order of the calls; of one `layer`, or of all."""
        known: dict[tuple[int, Site], CacheRead] = {}
        for record in self.cache:
            if layer is not None and record.layer != layer:
                continue
            previous = known.get((record.layer, record.site))
            read = _complete(record, previous)
            known[record.layer, record.site] = read
            yield read
            self.count(read.rows.nbytes)

    def count(self, n_bytes: int) -> None:
        """Note that so many bytes of recorded values were read, so that their pages are let go of in time."""
        if self.pages is not None:
            self.pages.count(n_bytes)

    def release_pages(self) -> None:
        """Let go of the mapped pages of a trace that was read; its values stay readable."""
        if self.pages is not None:
            self.pages.release()

    def keep(self, positions: tuple[int, ...]) -> None:
        """Let go of the rows of all other tokens; what was read of the cache stays, as read for these."""
        self.rows = [kept for row in self.rows if (kept := _rows_at(row, positions)) is not None]
        self.cache = [replace(read, positions=_among(read.positions, positions)) for read in self.cache]

    def append(self, later: Trace) -> None:
        """Add what was recorded of another call of the same pass."""
        self.calls += later.calls
        self.rows += later.rows
        self.products += later.products
        for read in later.cache_reads():
            self.add_cache_read(read.layer, read.site, read.positions, read.slots, read.rows)
        for layer, spec in later.attention.items():
            self.add_attention(layer, spec)

    def places(self) -> set[tuple[int | None, Site]]:
        """Return the layers and sites of which anything was recorded."""
        rows = {(record.layer, record.site) for record in self.rows}
        return rows | {(record.layer, record.site) for record in self.cache}

    def call_ends(self) -> frozenset[int]:
        """Return the positions that were the last of a call: only there does a recurrent state exist."""
        return frozenset(call.start + call.q_len - 1 for call in self.calls)

    def release(self) -> None:
        """Drop what is only needed while the pass is still being recorded."""
        self._last_read.clear()


@dataclass(slots=True)
class PassPair:
    """Two recorded routes to the same tokens, to be compared at `positions`."""

    mode: Mode
    prefill: Trace
    decode: Trace
    positions: tuple[int, ...]


def _among(positions: tuple[int, ...], wanted: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(position for position in positions if position in wanted)


def _rows_at(record: RowRecord, wanted: tuple[int, ...]) -> RowRecord | None:
    """A record without the rows of other tokens than those `wanted`, None if it has no others."""
    kept = _among(record.positions, wanted)
    if kept == record.positions:
        return record
    index = [record.positions.index(position) for position in kept]
    return replace(record, positions=kept, values=record.values[index]) if kept else None


def _changed_rows(previous: CacheRead, slots: Slots, rows: Array) -> Slots:
    """Return the indices of the rows whose bytes differ from the previous read of the same slot, or that are new."""
    if previous.rows.shape[1:] != rows.shape[1:] or previous.rows.dtype != rows.dtype:
        return np.arange(len(slots))
    n_before = _continued(slots, previous.slots)
    if n_before:
        same = (_row_bytes(rows[:n_before]) == _row_bytes(previous.rows)).all(axis=1)
        return np.concatenate([np.flatnonzero(~same), np.arange(n_before, len(slots))])
    source = _places(slots, previous.slots)
    known = source >= 0
    same = np.zeros(len(slots), dtype=bool)
    if known.any():
        old = _row_bytes(previous.rows[source[known]])
        same[known] = (_row_bytes(rows[known]) == old).all(axis=1)
    return np.flatnonzero(~same)


def _continued(slots: Slots, before: Slots) -> int:
    """Return how many slots a read has in common with the one before it, if it begins with them and only appends, as
    nearly every read does; 0 if not."""
    n_before = len(before)
    if not 0 < n_before <= len(slots) or not np.array_equal(slots[:n_before], before):
        return 0
    return n_before if bool((slots[1:] > slots[:-1]).all()) else 0


def _places(slots: Slots, among: Slots) -> Slots:
    """Return the index of each slot in `among`, the last one if there are several, and -1 if there is none."""
    if len(among) == 0:
        return np.full(len(slots), -1, dtype=np.int64)
    order = np.argsort(among, kind="stable")
    place = order[np.searchsorted(among, slots, side="right", sorter=order) - 1]
    return np.where(among[place] == slots, place, -1)


def _row_bytes(rows: Array) -> NDArray[np.uint8]:
    flat = np.ascontiguousarray(rows).reshape(rows.shape[0], -1)
    return flat.view(np.uint8)


def _complete(record: CacheRecord, previous: CacheRead | None) -> CacheRead:
    if len(record.stored) == len(record.slots):
        return CacheRead(record.layer, record.site, record.positions, record.slots, record.rows)
    if previous is None:
        raise AlignmentError(f"layer {record.layer} / {record.site}: the first cache read is not complete")
    rows = np.empty((len(record.slots), *record.rows.shape[1:]), dtype=record.rows.dtype)
    kept = np.ones(len(record.slots), dtype=bool)
    kept[record.stored] = False
    if _continued(record.slots, previous.slots) == len(previous.slots) and not kept[len(previous.slots) :].any():
        rows[: len(previous.slots)] = previous.rows
        rows[record.stored] = record.rows
        return CacheRead(record.layer, record.site, record.positions, record.slots, rows)
    source = _places(record.slots[kept], previous.slots)
    if (source < 0).any():
        slot = int(record.slots[kept][source < 0][0])
        raise AlignmentError(f"layer {record.layer} / {record.site}: slot {slot} has no earlier row")
    rows[kept] = previous.rows[source]
    rows[record.stored] = record.rows
    return CacheRead(record.layer, record.site, record.positions, record.slots, rows)
