"""From a pair of passes to a block of the drift table: every pair of values with its figures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kvdrift.pairing.align import Aligner, Pair
from kvdrift.pairing.kernels import (
    Compared,
    DriftFigures,
    count_differing,
    equal_rows,
    hash_rows,
    measure,
    measure_all,
    relative_drifts,
)
from kvdrift.pairing.rows import (
    COLUMNS,
    DIGEST,
    HASHES,
    Block,
    Bools,
    Floats,
    Ints,
    array_of,
    empty_column,
    layer_code,
    narrowed,
    site_code,
)
from kvdrift.pairing.series import ReadSeries, SlotFigures
from kvdrift.trace.model import Array, PassPair
from kvdrift.vocabulary.sites import Site

# Elements of either side that are measured at once: enough that calling numpy costs little, and in float64 still little
# enough for the caches of a CPU.
_BATCH = 1 << 16

_FIGURES = tuple(item.name for item in fields(DriftFigures))


def compare(aligner: Aligner, mode: str, *, with_hashes: bool) -> Block:
    """Measure every pair that `aligner` finds, as a block of `mode`."""
    pair, series = aligner.pair, ReadSeries(with_hashes)

    def columns_of(batch: Sequence[Pair]) -> dict[str, NDArray[Any]]:
        long = series.measure(batch)
        figures = figures_of(batch) if long is None else long.figures
        columns = _columns(pair, batch, figures, _slots(batch, figures) if long is None else [long.slots])
        if long is not None and long.digests is not None:
            columns |= {name: array_of([digest], np.void) for name, digest in zip(HASHES, long.digests, strict=True)}
        elif with_hashes:
            _add_hashes(columns, batch, figures)
        return columns

    return _block(aligner, mode, COLUMNS, columns_of)


# What noise is read off: the columns of `compare_drifts`.
DRIFTS = ("position", "layer", "site", "n_elements", "n_differ", "rel_l2")


def compare_drifts(aligner: Aligner, mode: str) -> Block:
    """Return what `compare` does with no columns but `DRIFTS`, in less than half of its time."""
    return _block(aligner, mode, DRIFTS, _drift_columns)


def _block(
    aligner: Aligner, mode: str, names: Iterable[str], columns_of: Callable[[Sequence[Pair]], dict[str, NDArray[Any]]]
) -> Block:
    pair = aligner.pair
    parts, numbers = [], []
    for batch in batches(aligner.pairs()):
        parts.append(columns_of(batch.pairs))
        numbers.append(batch.numbers)
        for trace in (pair.prefill, pair.decode):
            trace.count(batch.size * batch.pairs[0].prefill.dtype.itemsize)
    order = np.argsort(np.concatenate(numbers)) if parts else np.empty(0, dtype=np.intp)
    columns = {
        name: narrowed(np.concatenate([part[name] for part in parts])[order]) if parts else empty_column(name, 0)
        for name in names
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
    dtypes = {side.dtype for values in batch for side in (values.prefill, values.decode)}
    if len(dtypes) > 1:  # the walk lets no such pair through, and side by side they would all become the widest
        return measure_all([Compared(values.prefill, values.decode, _shift_of(values)) for values in batch])
    prefill, decode = _sides(batch)
    return measure(prefill, decode, free_shift_of=_shift_of(batch[0]))


def _sides(batch: Sequence[Pair]) -> tuple[Array, Array]:
    """Prefill's and decode's rows of all pairs, one behind the other; of several dtypes in the widest."""
    sides = ([values.prefill for values in batch], [values.decode for values in batch])
    prefill, decode = (np.concatenate(side) if len(side) > 1 else side[0] for side in sides)
    return prefill, decode


def _shift_of(values: Pair) -> int | None:
    """How many keys each head has, for scores."""
    return values.row_size if values.site is Site.ATTN_SCORES and values.row_size else None


def _drift_columns(batch: Sequence[Pair]) -> dict[str, NDArray[Any]]:
    prefill, decode = _sides(batch)
    if prefill.dtype != decode.dtype:  # as in `figures_of`
        figures = figures_of(batch)
        rel_l2, n_differ = figures.rel_l2, figures.n_differ
    else:
        rel_l2 = relative_drifts(prefill, decode, free_shift_of=_shift_of(batch[0]))
        n_differ = count_differing(prefill, decode)
    found = _addresses(batch)
    is_turned = found.is_rounded & found.is_read
    return found.columns | {
        "n_elements": np.full(len(rel_l2), prefill.shape[1]),
        "n_differ": np.where(is_turned, 0, n_differ),
        "rel_l2": np.where(found.n_lost > 0, np.inf, rel_l2),
    }


class _Addresses(NamedTuple):
    """What is known of each position of each pair of a batch before anything is measured, each an array [pair]."""

    columns: dict[str, NDArray[Any]]
    n_lost: Ints
    is_rounded: Bools
    is_read: Bools


def _addresses(batch: Sequence[Pair]) -> _Addresses:
    counts = [len(values.positions) for values in batch]
    known = np.array(
        [
            (layer_code(values.layer), site_code(values.site), values.n_lost, values.is_rounded, values.slots is None)
            for values in batch
        ],
        dtype=np.int64,
    ).repeat(counts, axis=0)
    columns: dict[str, NDArray[Any]] = {
        "position": np.array([position for values in batch for position in values.positions], dtype=np.int64),
        "layer": known[:, 0].astype(np.int32),
        "site": known[:, 1].astype(np.int8),
    }
    return _Addresses(columns, known[:, 2], known[:, 3] > 0, known[:, 4] == 0)


def _columns(
    pair: PassPair, batch: Sequence[Pair], figures: DriftFigures, slots: Sequence[SlotFigures]
) -> dict[str, NDArray[Any]]:
    counts = [len(values.positions) for values in batch]
    first = batch[0].prefill  # of one kind with all the others
    found = _addresses(batch)
    position, n_lost, is_rounded = found.columns["position"], found.n_lost, found.is_rounded
    # A key or slot that only one side has is a difference that no norm over the common ones can show.
    is_lost = n_lost > 0
    columns: dict[str, NDArray[Any]] = {name: getattr(figures, name) for name in _FIGURES}
    # Rows that were turned back into another frame have bits of their own.
    is_turned = is_rounded & found.is_read
    n_off = np.repeat([values.n_off for values in batch], counts)
    columns["n_differ"] = np.where(is_turned, 0, columns["n_differ"])
    columns |= found.columns
    columns |= {
        "token_id": np.array(pair.prefill.tokens, dtype=np.int64)[position],
        # One object for all: `np.full` would make one for each of them.
        "dtype": np.broadcast_to(np.array(first.dtype.name, dtype=object), len(position)),
        "n_elements": np.full(len(position), first.shape[1]),
        "equal": figures.equal & ~is_lost & ~is_rounded,
        "rel_l2": np.where(is_lost, np.inf, figures.rel_l2),
        "n_lost": n_lost,
        "worst_slot": np.repeat([found.worst for found in slots], counts),
        "n_bad_slots": np.repeat([found.n_bad for found in slots], counts),
        "n_bad_past": np.where(is_turned, n_off, np.repeat([found.n_bad_past for found in slots], counts)),
        # Zeros without memory of their own, until hashes are added.
        **dict.fromkeys(HASHES, np.broadcast_to(np.zeros((), dtype=DIGEST), len(position))),
    }
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


def _slots(batch: Sequence[Pair], measured: DriftFigures) -> list[SlotFigures]:
    """Which cached position drifts most, how many rows differ in their bits, and how many of those are older."""
    found = [SlotFigures()] * len(batch)
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
            found[index] = SlotFigures(int(slots[int(np.argmax(drift))]), int(bad.sum()), int(past.sum()))
            start = stop
    return found


def _drifts(prefill: Array, decode: Array) -> Floats:
    """The relative drift of each row, of few enough rows at a time for the caches of a CPU."""
    step = max(1, _BATCH // prefill.shape[1])
    parts = [relative_drifts(prefill[at : at + step], decode[at : at + step]) for at in range(0, len(prefill), step)]
    return np.concatenate(parts)
