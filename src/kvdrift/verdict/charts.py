"""What the pictures of a report show, as arrays: one value a layer and site, a rung, a position, a cached row.

Nothing is decided here. Figures are aggregates over prompts and positions, so that their number does not grow with the
length of the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from kvdrift.diagnosis.model import Suspect, Values
from kvdrift.instruments.ladder import Excess
from kvdrift.pairing.rows import Bools, Floats, Ints, Rows
from kvdrift.verdict.error_rows import ErrorRow, error_row
from kvdrift.verdict.judge import Judged
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.precision import UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, Site

_Where = Callable[[Rows], Ints]
_Chosen = Callable[[Rows], Bools]

# Keys of an attention row that a picture can show apart from each other.
_MOST_KEYS = 256
# Cached rows that a cache map shows; more than these cannot be told apart either.
_MOST_SLOTS = 2000


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One site of one layer, all prompts and positions together.

    `excess` is the largest drift over its bound at the fine rung, None where no bound is known, NaN where a value is.
    `is_judged` says whether drift was judged there, by such a bound or, in foreign traces, by their own inputs.
    `worst` is the address of the largest drift at the native dtype, with `drift` (relative, 2-norm), `ulp` and the
    hashes of both passes there. `is_beyond` says whether any address of the place is beyond noise by any instrument.
    """

    place: Place
    excess: float | None
    bound: float | None
    drift: float
    ulp: float
    n_pairs: int
    n_exact: int
    worst: Address
    sha256_prefill: str | None
    sha256_decode: str | None
    is_beyond: bool
    is_judged: bool = True

    @property
    def state(self) -> Literal["equal", "within", "unknown", "beyond"]:
        """What the drift is: equal bits, within noise, beyond it, or unknown where nothing bounds it."""
        if self.is_beyond or (self.excess is not None and not self.excess <= 1.0):
            return "beyond"
        if self.n_exact == self.n_pairs:
            return "equal"
        return "within" if self.is_judged else "unknown"


@dataclass(frozen=True, slots=True, kw_only=True)
class RungDrift:
    """Relative drift at one rung over all pairs that drift: median and largest. `unit` is its unit roundoff.

    `bound` is the median bound there, None at rungs where nothing is judged by one.
    """

    rung: str
    unit: float
    median: float
    largest: float
    bound: float | None


@dataclass(frozen=True, slots=True)
class Line:
    """The largest relative drift by layer, or by position behind the prompt, at one rung."""

    rung: str
    at: tuple[int, ...]
    drift: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModeCharts:
    """The pictures of one mode. `site_through` names the site whose drift is followed through the layers."""

    cells: tuple[Cell, ...]
    rungs: tuple[RungDrift, ...]
    site_through: Site | None
    through: tuple[Line, ...]
    along: tuple[Line, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionRow:
    """Probabilities of one head at the first failing layer, [key] each; `slots` are the positions of the keys.

    With more keys than can be told apart in a picture, those around the largest difference are kept.
    """

    address: Address
    head: int
    slots: tuple[int, ...]
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    n_keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BadSlot:
    """A cached row that is the worst of a read beyond its bound."""

    layer: int
    site: Site
    slot: int
    excess: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Charts:
    """All pictures of a route. `n_cached` is the largest number of cached positions that was read, `error` the elements
    of the value that fails first."""

    modes: Mapping[str, ModeCharts]
    first: Address | None
    n_layers: int
    attention: AttentionRow | None
    bad_slots: tuple[BadSlot, ...]
    n_cached: int
    error: ErrorRow | None = None


def build_charts(judged: Judged) -> Charts:
    """Return the arrays behind the pictures of a judged route."""
    run, decision = judged.measured, judged.decision
    modes = {mode: _mode(judged, mode) for mode in run.modes}
    layers = {cell.place.layer for charts in modes.values() for cell in charts.cells if cell.place.layer is not None}
    return Charts(
        modes={mode: charts for mode, charts in modes.items() if charts.cells},
        first=decision.first_failure,
        n_layers=max([run.info.n_layers, *(layer + 1 for layer in layers)], default=0),
        attention=_attention(judged),
        bad_slots=tuple(_bad_slots(judged))[:_MOST_SLOTS],
        n_cached=max((len(prompt.tokens) for prompt in run.prompts), default=0),
        error=None if (suspect := _suspect(judged)) is None else error_row(suspect, decision.first_slot),
    )


def cells_of(judged: Judged, mode: str) -> tuple[Cell, ...]:
    """Return a cell for each place that was compared in a mode, in forward order."""
    run, climb, native = judged.measured, judged.decision.climbs[mode], judged.decision.natives[mode]
    beyond = {*native.beyond, *climb.excess.rows.addresses(climb.excess.beyond)}
    if (first := judged.decision.first_failure) is not None:
        beyond.add(first)
    by_inputs = run.foreign is not None and native.n_within > 0
    unjudged = {*native.uncovered} if by_inputs else None
    rows = run.table.select(mode, run.info.dtype)
    return tuple(_cells(rows, climb.excess, climb.bounds, {address.place for address in beyond}, unjudged))


def _mode(judged: Judged, mode: str) -> ModeCharts:
    run, climb = judged.measured, judged.decision.climbs[mode]
    native = run.table.select(mode, run.info.dtype)
    rungs = [rung for rung in (run.info.dtype, run.info.ladder.lower, run.info.ladder.upper) if rung in UNIT_ROUNDOFF]
    by_rung = {rung: run.table.select(mode, rung) for rung in dict.fromkeys(rungs)}
    bounds = list(climb.bounds.values())
    fine = run.info.ladder.upper
    site = next((site for site in (Site.LAYER_OUT, Site.MLP_OUT, Site.ATTN_OUT) if native.is_at(site).any()), None)
    starts = {prompt.name: len(prompt.prompt) for prompt in run.prompts}
    return ModeCharts(
        cells=cells_of(judged, mode),
        rungs=tuple(
            RungDrift(
                rung=rung,
                unit=UNIT_ROUNDOFF[rung],
                median=float(np.median(drift)),
                largest=float(drift.max()),
                bound=float(np.median(bounds)) if bounds and rung == fine else None,
            )
            for rung, rows in by_rung.items()
            if len(drift := _drifting(rows))
        ),
        site_through=site,
        through=() if site is None else tuple(_lines(by_rung, lambda rows: rows.layer, lambda r: r.is_at(site))),
        along=tuple(_lines(by_rung, lambda rows: _steps(rows, starts), _is_last)),
    )


def _drifting(rows: Rows) -> Floats:
    return rows.rel_l2[(rows.rel_l2 > 0.0) & np.isfinite(rows.rel_l2)]


def _cells(
    native: Rows, excess: Excess, bounds: Mapping[Place, float], beyond: set[Place], unjudged: set[Place] | None
) -> Iterator[Cell]:
    """One cell for each place that was compared, in forward order; `unjudged` are those that the inputs of foreign
    traces do not bound, None where inputs bound nothing."""
    judged = _largest_with_nan(excess)
    for place, rows in sorted(native.groups(), key=lambda item: item[0].forward_rank):
        drift = np.where(np.isnan(rows.rel_l2), np.inf, rows.rel_l2)
        worst = rows.row(int(drift.argmax()))
        value = judged.get(place)
        yield Cell(
            place=place,
            excess=value,
            bound=bounds.get(place),
            drift=worst.rel_l2,
            ulp=worst.max_ulp,
            n_pairs=len(rows),
            n_exact=int(rows.equal.sum()),
            worst=worst.address,
            sha256_prefill=worst.sha256_prefill,
            sha256_decode=worst.sha256_decode,
            is_beyond=place in beyond,
            is_judged=value is not None or (unjudged is not None and place not in unjudged),
        )


def _largest_with_nan(excess: Excess) -> dict[Place, float]:
    """The largest excess of each place; NaN where one is."""
    if not len(excess):
        return {}
    rows = excess.rows
    found = np.full(len(rows.places), -np.inf)
    np.maximum.at(found, rows.place, excess.values)
    return dict(zip(rows.places, found.tolist(), strict=True))


def _lines(by_rung: Mapping[str, Rows], where: _Where, chosen: _Chosen) -> Iterator[Line]:
    """The largest finite drift of the chosen pairs at each value of `where`, a line for each rung."""
    for rung, rows in by_rung.items():
        some = rows.where(chosen(rows) & np.isfinite(rows.rel_l2)) if len(rows) else rows
        if not len(some):
            continue
        at, index = np.unique(where(some), return_inverse=True)
        drift = np.zeros(len(at))
        np.maximum.at(drift, index, some.rel_l2)
        yield Line(rung, tuple(at.tolist()), tuple(drift.tolist()))


def _steps(rows: Rows, starts: Mapping[str, int]) -> Ints:
    """How many tokens each pair lies behind the end of its prompt; 0 for the first one fed by decode."""
    return np.asarray(
        rows.position - np.array([starts.get(name, 0) for name in rows.names], dtype=np.int64)[rows.prompt]
    )


def _is_last(rows: Rows) -> Bools:
    """Whether each pair is one of the last site that was recorded."""
    return np.asarray(rows.rank == rows.rank.max())


def _attention(judged: Judged) -> AttentionRow | None:
    """Both passes' probabilities of the head that differs most, at the first failure; None where none were kept."""
    suspect = _suspect(judged)
    if suspect is None or suspect.address.layer is None:
        return None
    position = suspect.address.position
    sides = [_probabilities(side, position) for side in (suspect.prefill, suspect.decode)]
    if sides[0] is None or sides[1] is None:
        return None
    (prefill, prefill_slots), (decode, decode_slots) = sides[0], sides[1]
    # A prefill of several tokens has columns for keys behind this token, which it masks.
    slots, left, right = np.intersect1d(prefill_slots, decode_slots, return_indices=True)
    if len(prefill) != len(decode) or not len(slots):
        return None
    prefill, decode = prefill[:, left], decode[:, right]
    off = np.abs(np.nan_to_num(decode - prefill, nan=np.inf))
    head = int(off.max(axis=1).argmax())
    start = max(0, min(int(off[head].argmax()) - _MOST_KEYS // 2, len(slots) - _MOST_KEYS))
    kept = slice(start, start + _MOST_KEYS)
    return AttentionRow(
        address=Address(suspect.address.prompt, position, suspect.address.layer, Site.ATTN_PROBS),
        head=head,
        slots=tuple(slots[kept].tolist()),
        prefill=tuple(prefill[head, kept].tolist()),
        decode=tuple(decode[head, kept].tolist()),
        n_keys=len(slots),
    )


def _probabilities(side: Values, position: int) -> tuple[Floats, Ints] | None:
    """Probabilities [head, key] and the logical position of each key, of keys that are tokens."""
    values, slots = side.at(Site.ATTN_PROBS, position), side.slots.get((Site.ATTN_PROBS, position))
    if values is None or values.ndim != 2:
        return None
    at = np.arange(values.shape[1]) if slots is None else np.asarray(slots)
    if len(at) != values.shape[1]:
        return None
    return values[:, at >= 0], at[at >= 0]


def _suspect(judged: Judged) -> Suspect | None:
    """The values that were kept of the first failure, from the mode with aligned inputs where it has them."""
    run, first = judged.measured, judged.decision.first_failure
    if first is None:
        return None
    rungs = (run.info.ladder.upper, run.info.dtype)
    found = (run.suspects.at(first, mode, rung) for rung in rungs for mode in reversed(run.modes))
    return next((item for item in found if item is not None), None)


def _bad_slots(judged: Judged) -> Iterator[BadSlot]:
    """The worst row of every read of the cache that is beyond its bound, the largest excess of each row, once."""
    largest: dict[tuple[int, Site, int], float] = {}
    for climb in judged.decision.climbs.values():
        beyond = climb.excess.where(climb.excess.beyond & climb.excess.rows.is_at(*CACHE_SITES))
        for row, value in zip(beyond.rows, beyond.values.tolist(), strict=True):
            if row.layer is not None and row.worst_slot >= 0:
                key = (row.layer, row.site, row.worst_slot)
                largest[key] = max(value, largest.get(key, 0.0))
    for (layer, site, slot), value in sorted(largest.items()):
        yield BadSlot(layer=layer, site=site, slot=slot, excess=value)
