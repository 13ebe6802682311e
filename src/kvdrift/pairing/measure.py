"""From a pair of passes to a block of the drift table: every pair of values with its figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.align import Aligner, Pair
from kvdrift.pairing.kernels import (
    Compared,
    DriftFigures,
    equal_rows,
    hash_rows,
    measure,
    measure_all,
    relative_drifts,
)
from kvdrift.pairing.rows import COLUMNS, DIGEST, HASHES, Block, Floats, array_of, empty_column, layer_code, site_code
from kvdrift.trace.model import Array, PassPair
from kvdrift.vocabulary.sites import Site

# Elements of either side that are measured at once: enough that calling numpy costs little, and in float64 still little
# enough for the caches of a CPU.
_BATCH = 1 << 16

_FIGURES = tuple(item.name for item in fields(DriftFigures))


def compare(aligner: Aligner, mode: str, *, with_hashes: bool) -> Block:
    """Measure every pair that `aligner` finds, as a block of `mode`."""
    pair = aligner.pair
    parts, numbers = [], []
    for batch in batches(aligner.pairs()):
        parts.append(_columns(pair, batch.pairs, with_hashes))
        numbers.append(batch.numbers)
        for trace in (pair.prefill, pair.decode):
            trace.count(batch.size * batch.pairs[0].prefill.dtype.itemsize)
    order = np.argsort(np.concatenate(numbers)) if parts else np.empty(0, dtype=np.intp)
    columns = {
        name: np.concatenate([part[name] for part in parts])[order] if parts else empty_column(name, 0)
        for name in COLUMNS
    }
    return Block(mode, pair.prefill.rung, pair.prefill.prompt, columns)


@dataclass(slots=True)
class Batch:
    """Pairs whose rows have one length, dtype and run of keys. `starts` say which row of all the first of each is."""

    pairs: list[Pair] = field(default_factory=list)
    starts: list[int] = field(default_factory=list)
    size: int = 0

    @property
    def numbers(self) -> NDArray[np.intp]:
        """Which rows of all pairs these are, in their order."""
        counts = np.array([len(pair.positions) for pair in self.pairs])
        before = np.cumsum(counts) - counts
        return np.asarray(np.arange(int(counts.sum())) + np.repeat(np.array(self.starts) - before, counts))


def batches(pairs: Iterable[Pair]) -> Iterator[Batch]:
    """Yield the pairs, as many of one kind at a time as are worth one computation and take little memory."""
    waiting: dict[tuple[object, ...], Batch] = {}
    start = 0
    for pair in pairs:
        kind = (pair.prefill.shape[1], pair.prefill.dtype, _shift_of(pair))
        batch = waiting.setdefault(kind, Batch())
        batch.pairs.append(pair)
        batch.starts.append(start)
        batch.size += pair.prefill.size
        start += len(pair.positions)
        if batch.size >= _BATCH:
            yield waiting.pop(kind)
    yield from waiting.values()


def figures_of(batch: Sequence[Pair]) -> DriftFigures:
    """Return the figures of all positions of all pairs of a batch, in their order; scores may be shifted by a constant
    for each head."""
    sides = ([values.prefill for values in batch], [values.decode for values in batch])
    dtypes = {side.dtype for values in batch for side in (values.prefill, values.decode)}
    if len(dtypes) > 1:  # the walk lets no such pair through, and side by side they would all become the widest
        return measure_all([Compared(values.prefill, values.decode, _shift_of(values)) for values in batch])
    prefill, decode = (np.concatenate(side) if len(side) > 1 else side[0] for side in sides)
    return measure(prefill, decode, free_shift_of=_shift_of(batch[0]))


def _shift_of(values: Pair) -> int | None:
    """How many keys each head has, for scores."""
    return values.row_size if values.site is Site.ATTN_SCORES and values.row_size else None


def _columns(pair: PassPair, batch: Sequence[Pair], with_hashes: bool) -> dict[str, NDArray[Any]]:
    figures = figures_of(batch)
    slots = _slots(batch, figures)
    counts = [len(values.positions) for values in batch]
    position = np.array([position for values in batch for position in values.positions], dtype=np.int64)
    first = batch[0].prefill  # of one kind with all the others
    n_lost = np.repeat([values.n_lost for values in batch], counts)
    # A key or slot that only one side has is a difference that no norm over the common ones can show.
    is_lost = n_lost > 0
    is_rounded = np.repeat([values.is_rounded for values in batch], counts)
    columns: dict[str, NDArray[Any]] = {name: getattr(figures, name) for name in _FIGURES}
    # Rows that were turned back into another frame have bits of their own.
    is_turned = is_rounded & np.repeat([values.slots is not None for values in batch], counts)
    columns["n_differ"] = np.where(is_turned, 0, columns["n_differ"])
    columns |= {
        "token_id": np.array(pair.prefill.tokens, dtype=np.int64)[position],
        "position": position,
        "layer": np.repeat(np.array([layer_code(values.layer) for values in batch], dtype=np.int32), counts),
        "site": np.repeat(np.array([site_code(values.site) for values in batch], dtype=np.int8), counts),
        "dtype": np.full(len(position), first.dtype.name, dtype=object),
        "n_elements": np.full(len(position), first.shape[1]),
        "equal": figures.equal & ~is_lost & ~is_rounded,
        "rel_l2": np.where(is_lost, np.inf, figures.rel_l2),
        "n_lost": n_lost,
        "worst_slot": np.repeat([found.worst for found in slots], counts),
        "n_bad_slots": np.repeat([found.n_bad for found in slots], counts),
        "n_bad_past": np.where(is_turned, 0, np.repeat([found.n_bad_past for found in slots], counts)),
        # Zeros without memory of their own, until hashes are added.
        **dict.fromkeys(HASHES, np.broadcast_to(np.zeros((), dtype=DIGEST), len(position))),
    }
    if with_hashes:
        _add_hashes(columns, batch, figures)
    return columns


def _add_hashes(columns: dict[str, NDArray[Any]], batch: Sequence[Pair], figures: DriftFigures) -> None:
    """Hash what the engine computed; values of the same bits have the same hash."""
    first = [digest for values in batch for digest in hash_rows(values.prefill)]
    columns["sha256_prefill"] = array_of(first, np.void)
    columns["sha256_decode"] = columns["sha256_prefill"].copy()
    start = 0
    for values in batch:
        stop = start + len(values.positions)
        differing = np.flatnonzero(~figures.equal[start:stop])
        if len(differing):
            columns["sha256_decode"][start + differing] = array_of(hash_rows(values.decode[differing]), np.void)
        start = stop


@dataclass(frozen=True, slots=True)
class _SlotFigures:
    worst: int = -1
    n_bad: int = 0
    n_bad_past: int = 0


def _slots(batch: Sequence[Pair], measured: DriftFigures) -> list[_SlotFigures]:
    """Which cached position drifts most, how many rows differ in their bits, and how many of those are older."""
    found = [_SlotFigures()] * len(batch)
    if all(values.slots is None for values in batch):
        return found
    counts = np.array([len(values.positions) for values in batch])
    is_equal = np.logical_and.reduceat(measured.equal, np.cumsum(counts) - counts)
    differing = [
        (index, values, values.slots)
        for index, values in enumerate(batch)
        if values.slots is not None and not is_equal[index]
    ]
    if not differing:
        return found
    sizes = {values.row_size for _, values, _ in differing}
    for alike in [differing] if len(sizes) == 1 else [[item] for item in differing]:
        sides = [
            [side.reshape(-1, values.row_size) for side in (values.prefill, values.decode)] for _, values, _ in alike
        ]
        prefill, decode = (np.concatenate(rows) if len(rows) > 1 else rows[0] for rows in zip(*sides, strict=True))
        same, drifts, start = equal_rows(prefill, decode), _drifts(prefill, decode), 0
        for index, values, slots in alike:
            stop = start + len(slots)
            bad, drift = ~same[start:stop], drifts[start:stop]
            past = bad & (slots < values.positions[0])
            found[index] = _SlotFigures(int(slots[int(np.argmax(drift))]), int(bad.sum()), int(past.sum()))
            start = stop
    return found


def _drifts(prefill: Array, decode: Array) -> Floats:
    """The relative drift of each row, of few enough rows at a time for the caches of a CPU."""
    step = max(1, _BATCH // prefill.shape[1])
    parts = [relative_drifts(prefill[at : at + step], decode[at : at + step]) for at in range(0, len(prefill), step)]
    return np.concatenate(parts)
