"""Instrument 2, the precision ladder: rounding shrinks with the unit roundoff, a wrong formula does not.

Both passes run again with the same weights at float64. What each of them really rounds to there is measured
(`kvdrift.pairing.floors`), and with the floors s of the two passes at a place

    beyond rounding   if and only if   drift > 16 max(s_prefill + s_decode, 2^-44),

the drift in the 2-norm, relative to the larger of the two values. Two passes whose errors are of the size e drift by
1.4 e, and have floors of 2.4 e each, so that the bound is 55 times what rounding makes: the floor is that of a few
positions, and other tokens may round somewhat more coarsely. At 2^-44, 512 roundings of float64, nothing is told from
float64. A vector of few elements has a larger bound (below).

At float32, the finest rung of some engines, the bound is 8 max(s_prefill + s_decode, 2^-22) (`compare.floors.SCALES`).

Without measured floors (an engine that takes no layer inputs, traces of earlier versions) the passes also run at
float32. A drift that rounding makes is proportional to the unit roundoff u: log drift over log u has slope 1. A drift
that a fault makes stays where it is: slope 0. The
geometric midpoint of the two parts them. With r32, r64 the relative drifts of one address on the two rungs,

    slope < 1/2   if and only if   r64 > r32 * sqrt(u64 / u32),

and r32 is taken as at least u32, since a drift cannot be measured below one rounding. The bound stands more than four
orders of magnitude above what rounding predicts for r64 and as far below what a fault that shows at float32 leaves
there, so no constant was fitted and no p-value is claimed.

An engine whose finest precision is float32 climbs from float16 to float32 instead: the rule is the same, with the unit
roundoffs of the two rungs that it has (`Rungs`). The bound is then no more than 90 roundings of the fine rung, so that
chance must be reckoned with: a vector of few elements, such as the scores of four experts, is now and then much shorter
than what it was computed from, and its relative error larger in proportion. For n elements of one size and any sign

    P(norm <= t * typical norm) <= (t * sqrt(e))^n

(Chernoff's bound for chi-squared with n degrees of freedom), so that the bound is p^(-1/n) times as large there, with p
the chance that is taken for one address.

An operation that stays pinned to float32 inside the float64 run would look like a plateau. The engine lifts such pins
where it can; what is left is measured, by prefill against prefill at another length at float64, and raises the bound.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import Blind, Judges, Panel, Run, Seen
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import FloorTable
from kvdrift.pairing.merges import Merges
from kvdrift.pairing.rows import Bools, DriftRow, Floats, Rows
from kvdrift.pairing.scales import Scales
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import SELF_NOISE, Mode
from kvdrift.vocabulary.precision import LOWER, RUNGS, UNIT_ROUNDOFF, UPPER, Rungs
from kvdrift.vocabulary.sites import Site

Bounds = dict[Place, float]

# Roundings of a pinned table: what its noise may reach, and what two passes may differ by that read its neighbours.
_OF_TABLE, _PAIR = 4.0, 2.0

# Two prefills that differ by more than this many float32 roundings do not differ because an operation is pinned.
_PINNED_MOST = 64.0

# Sites that an operation pinned inside the feed-forward part reaches within its own layer.
_BEHIND_PINNED = (Site.MLP_OUT, Site.LAYER_OUT)

# Two frames of rotations by a table of float32 leave no more than this: some roundings of it.
_FRAME_MOST = 16.0 * UNIT_ROUNDOFF[LOWER]

# The chance that a vector of few elements is shorter than its bound allows for.
_SHORT = 1e-6

# A pinned operation can make decode drift more than two prefills do (other kernels, fewer rows): this many times more.
_PINNED_MARGIN = 32.0


@dataclass(frozen=True, slots=True, eq=False)
class Excess:
    """The drift of the pairs `rows` over their bounds: `values` [pair], without a unit.

    Above 1 is beyond rounding, and so is NaN.
    """

    rows: Rows
    values: Floats

    def __len__(self) -> int:
        return len(self.values)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Excess)
            and np.array_equal(self.values, other.values, equal_nan=True)
            and self.rows.addresses() == other.rows.addresses()
        )

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, address: Address) -> float:
        index = self.rows.index(address)
        if index is None:
            raise KeyError(address)
        return float(self.values[index])

    @property
    def beyond(self) -> Bools:
        """Whether each pair is beyond its bound, [pair]; NaN is."""
        return np.asarray(~(self.values <= 1.0))

    @property
    def largest(self) -> float | None:
        """The largest excess, None without pairs; NaN if one is."""
        return float(self.values.max()) if len(self.values) else None

    def where(self, chosen: Bools) -> Excess:
        """Return the part of the pairs that a mask [pair] chooses."""
        return Excess(self.rows.where(chosen), self.values[chosen])

    def of(self, rows: Rows) -> tuple[Floats, Bools]:
        """Return the excess at the addresses of `rows` of the same table, and where it is known, both [row].

        Where it is not known the excess has no meaning.
        """
        at = self.rows.find(rows.key)
        known = at >= 0
        return (self.values[at] if len(self) else np.full(len(rows), np.nan)), known


@dataclass(frozen=True, slots=True)
class Climb:
    """What the ladder found in one mode: `excess` is that at the fine rung, `bounds` are by place."""

    mode: str
    excess: Excess
    bounds: Bounds
    evidence: Evidence


def climb(table: DriftTable, mode: str, native: str, rungs: Rungs = RUNGS, floors: FloorTable | None = None) -> Climb:
    """Judge every pair of `mode` by the measured noise of the fine rung or, without it, by how its drift changes from
    the coarse rung to the fine one."""
    if floors is not None and floors.has(mode):
        return climb_measured(table, mode, native, rungs, floors)
    lower, upper = table.select(mode, rungs.lower), table.select(mode, rungs.upper)
    wanted = table.select(mode, native)
    bounds = _bounds(lower, _pinned_floor(table, rungs), rungs, mode)
    excess = excess_of(upper, bounds, rungs)
    missing = int(((excess.rows.find(wanted.key) < 0) | (lower.find(wanted.key) < 0)).sum())
    what = None
    if not len(excess) or missing:
        what = f"{missing} of {len(wanted)} pairs were not measured at {rungs.lower} and {rungs.upper}"
    return Climb(mode, excess, bounds, _evidence(mode, excess, bounds, native, table, what, rungs))


def climb_measured(table: DriftTable, mode: str, native: str, rungs: Rungs, floors: FloorTable) -> Climb:
    """Judge every pair of `mode` by the measured noise of the fine rung.

    A drift of NaN is beyond every bound; a place whose noise was not measured makes the ladder incomplete.
    """
    upper, wanted = table.select(mode, rungs.upper), table.select(mode, native)
    bounds = rounding_bounds(table, mode, rungs, floors)
    excess = measured_excess(upper, bounds)
    missing = int((excess.rows.find(wanted.key) < 0).sum())
    problem = f"{missing} of {len(wanted)} pairs were not measured at {rungs.upper}, or their noise was not" * bool(
        not len(excess) or missing
    )
    worst, beyond = excess.largest, int(excess.beyond.sum())
    slope = _slope(table, mode, native, rungs.upper) if native in UNIT_ROUNDOFF and native != rungs.upper else None
    stated = [
        min(bounds[place], 1.0) for place, floor in floors.of(mode).items() if place in bounds and not floor.cancels
    ]
    return Climb(
        mode,
        excess,
        bounds,
        Evidence(
            instrument="ladder",
            mode=mode,
            statistic_name=f"largest drift at {rungs.upper} over its measured noise",
            statistic=worst,
            bound=1.0,
            supports=None if worst is None or (problem and not beyond) else ("H1" if beyond else "H0"),
            valid=not problem,
            reason=problem or None,
            minimum_detectable=max(stated, default=None),
            text=(
                f"median slope of log drift on log u from {native} to {rungs.upper}: {_figure(slope)}; {beyond} of "
                f"{len(excess)} pairs stay above {floors.scale.margin:.0f} times the measured noise of both passes"
            ),
            detail={
                "n_pairs": len(excess),
                "n_beyond": beyond,
                "median_slope": slope,
                "median_minimum_detectable": float(np.median(list(bounds.values()))) if bounds else None,
                "n_cancelling": len(bounds) - len(stated),
            },
        ),
    )


def measured_bounds(floors: FloorTable, mode: str, pinned: float = 0.0) -> Bounds:
    """Return by place what two passes may drift by whose noise was measured; a place where one was not has none.

    Args:
        floors: of both passes.
        mode: whose places are meant.
        pinned: unit roundoff of a table that both passes read with nearly the same numbers. Their changes by the same
            entry cancel, as no second difference does, so that two roundings bound what such noise does to a drift.
    """
    scale, found = floors.scale, {}
    for place, floor in floors.of(mode).items():
        bound = scale.margin * max(floor.sum * _SHORT ** (-1.0 / floor.n_elements), scale.least)
        if scale.coarse < min(floor.prefill, floor.decode) and max(floor.prefill, floor.decode) < _OF_TABLE * pinned:
            bound = min(bound, _PAIR * pinned)
        if not math.isnan(bound):
            found[place] = bound
    return found


def frame_noise(left: Mapping[int, float]) -> float:
    """Return what rotations are rounded to whose two frames leave `left` by layer: nothing if that is no rounding."""
    most = max(left.values(), default=0.0)
    return most if most <= _FRAME_MOST else 0.0


def _is_coarse(floors: FloorTable, mode: str, layer: int) -> bool:
    """Whether attention of a layer rounds more coarsely than the rung: its noise then covers constants of its dtype."""
    floor = floors.of(mode).get(Place(layer, Site.ATTN_CTX))
    return floor is None or not floor.largest <= floors.scale.coarse


def _from_first(bounds: Bounds, layers: Mapping[int, float], noise: float) -> Bounds:
    """Bounds of at least `noise` from the first of some layers on: a table of rotations that was rounded turns by
    differences of positions only up to that, and no perturbed pass shows it."""
    if not noise:
        return bounds
    first = min(layers)
    return {
        place: max(bound, noise) if place.layer is None or place.layer >= first else bound
        for place, bound in bounds.items()
    }


def _behind_contexts(bounds: Bounds, found: Mapping[str, Merges], mode: str, margin: float) -> Bounds:
    """Bounds of at least `margin` times what contexts of some layers are off by, from there on."""
    known = found.get(mode, Merges())
    if not known.noise:  # what a kernel shows nothing of is measured with aligned inputs alone
        known = found.get(Mode.KV_ALIGNED, known)
    return {place: max(bound, known.behind(place, mode, margin)) for place, bound in bounds.items()}


def measured_excess(upper: Rows, bounds: Bounds) -> Excess:
    """Return the drift over its measured bound, of the pairs of `upper` whose place has one.

    It is relative to the larger of the two values, at least: where terms cancel, one of them may be nothing.
    """
    rows = upper.where(~np.isnan(upper.by_place(bounds)))
    with np.errstate(invalid="ignore"):
        drift = np.where(np.isinf(rows.rel_l2) & (rows.n_lost == 0) & np.isfinite(rows.max_abs), 1.0, rows.rel_l2)
        drift = np.where(np.isinf(drift), drift, drift / np.maximum(1.0, drift - 1.0))
    return Excess(rows, drift / rows.by_place(bounds))


def not_climbed(mode: str) -> Climb:
    """What there is to say of a ladder that was switched off: nothing was measured, and nothing is claimed."""
    reason = "switched off (--ladder off)"
    return Climb(
        mode,
        Excess(DriftTable().select(mode, UPPER), np.empty(0)),
        {},
        Evidence.abstain("ladder", mode, "largest drift at the fine rung over its rounding bound", reason),
    )


def rounding_bounds(table: DriftTable, mode: str, rungs: Rungs = RUNGS, floors: FloorTable | None = None) -> Bounds:
    """Return by place the largest relative drift, in the 2-norm, that rounding may cause at the fine rung of `mode`.

    It comes from the measured noise or, without it, from what the table holds so far; drifts that are NaN or infinite
    do not count.
    """
    if floors is not None and floors.has(mode):
        bounds, margin = measured_bounds(floors, mode, rungs.pinned), floors.scale.margin
        left, off = table.turned.get((mode, rungs.upper), {}), table.angles.get(mode, {})
        bounds = _from_first(bounds, left, margin * frame_noise(left))
        bounds = _from_first(bounds, off, margin * max(off.values(), default=0.0))
        known = table.scales.get(mode, Scales())
        if not known.factors:  # what a kernel shows nothing of is measured with aligned inputs alone
            known = table.scales.get(Mode.KV_ALIGNED, known)
        scales = {layer: size for layer, size in known.noise.items() if not _is_coarse(floors, mode, layer)}
        bounds = _from_first(bounds, scales, margin * max(scales.values(), default=0.0))
        bounds = _behind_contexts(bounds, table.merges, mode, margin)
        return _behind_contexts(bounds, table.of_8_bits, mode, margin)
    return _bounds(table.select(mode, rungs.lower), _pinned_floor(table, rungs), rungs, mode)


def _bounds(lower: Rows, floor: Mapping[Site, float], rungs: Rungs, mode: str) -> Bounds:
    """The largest relative drift at the fine rung that rounding may cause, by place.

    The drift at the coarse rung is pooled over prompts and positions: one address may agree by luck.
    """
    largest = lower.largest_by_place(np.where(np.isfinite(lower.rel_l2), lower.rel_l2, 0.0))
    coarse, fine = UNIT_ROUNDOFF[rungs.lower], UNIT_ROUNDOFF[rungs.upper]
    shrink = math.sqrt(fine / coarse)
    return {
        place: max(
            shrink * max(drift, coarse),
            _PINNED_MARGIN * floor.get(place.site, 0.0),
            _pinned_at(place.site, rungs, mode),
        )
        for place, drift in largest.items()
    }


def _pinned_at(site: Site, rungs: Rungs, mode: str) -> float:
    """What a pinned operation that the engine has named may do to a site: one of its roundings.

    With aligned inputs it stays behind that operation; as designed, every later layer inherits it.
    """
    return rungs.pinned if mode != Mode.KV_ALIGNED or site in _BEHIND_PINNED else 0.0


def _pinned_floor(table: DriftTable, rungs: Rungs) -> dict[Site, float]:
    """Drift at float64 between two prefills, by site, where float64 rounding cannot make it: something is pinned.

    Where the rungs are others nothing is lifted, so nothing can have been left behind.
    """
    if (rungs.lower, rungs.upper) != (LOWER, UPPER):
        return {}
    least = math.sqrt(UNIT_ROUNDOFF[LOWER] * UNIT_ROUNDOFF[UPPER])
    most = _PINNED_MOST * UNIT_ROUNDOFF[LOWER]
    rows = table.select(SELF_NOISE, UPPER)
    rows = rows.where((rows.rel_l2 > least) & (rows.rel_l2 <= most))
    floor: dict[Site, float] = {}
    for place, drift in rows.largest_by_place(rows.rel_l2).items():
        floor[place.site] = max(floor.get(place.site, 0.0), drift)
    return floor


def find_unstable_prefill(table: DriftTable, rungs: Rungs = RUNGS, floors: FloorTable | None = None) -> DriftRow | None:
    """Return where, at the fine rung, prefill of one token differs by more than its measured noise, or without it, at
    float64, by more than a pinned operation can make it, when other tokens follow, first in forward order; None if it
    does not.

    Such a prefill is not a function of its tokens so far (attention in both directions, tables that depend on the
    length), and cannot be the reference of a decode step.
    """
    rows = table.select(SELF_NOISE, rungs.upper)
    if floors is not None and floors.has(Mode.AS_DESIGNED):
        bounds = measured_bounds(floors, Mode.AS_DESIGNED, rungs.pinned)
        bounds = _behind_contexts(bounds, table.of_8_bits, Mode.AS_DESIGNED, floors.scale.margin)
        excess = measured_excess(rows, bounds)
        rows, found = excess.rows, np.flatnonzero(excess.values > 1.0)
    elif (rungs.lower, rungs.upper) != (LOWER, UPPER):
        return None
    else:
        found = np.flatnonzero(rows.rel_l2 > _PINNED_MOST * UNIT_ROUNDOFF[LOWER])
    return rows.row(int(found[np.argmin(rows.rank[found])])) if len(found) else None


def excess_of(upper: Rows, bounds: Bounds, rungs: Rungs = RUNGS) -> Excess:
    """Return the drift at the fine rung over its bound, of the pairs of `upper` whose place has one.

    A drift of NaN stays NaN, which is beyond its bound.
    """
    rows = upper.where(~np.isnan(upper.by_place(bounds)))
    return Excess(rows, rows.rel_l2 / _bounds_of(rows, bounds, rungs))


def _bounds_of(rows: Rows, bounds: Bounds, rungs: Rungs) -> Floats:
    """The bound of each pair."""
    found = rows.by_place(bounds)
    if rungs.upper == UPPER:
        return found
    sizes, at = np.unique(rows.n_elements, return_inverse=True)
    return np.asarray(found * np.array([_SHORT ** (-1.0 / n_elements) for n_elements in sizes.tolist()])[at])


def _evidence(
    mode: str, excess: Excess, bounds: Bounds, native: str, table: DriftTable, problem: str | None, rungs: Rungs
) -> Evidence:
    worst = excess.largest
    beyond = int(excess.beyond.sum())
    slope = _slope(table, mode, rungs.lower, rungs.upper)
    is_below = native in UNIT_ROUNDOFF and native not in (rungs.lower, rungs.upper)
    first = _slope(table, mode, native, rungs.lower) if is_below else None
    floor = {str(site): drift for site, drift in _pinned_floor(table, rungs).items()}
    text = (
        f"median slope of log drift on log u from {rungs.lower} to {rungs.upper}: {_figure(slope)}; {beyond} of "
        f"{len(excess)} pairs stay above the rounding bound"
    )
    supports = None if worst is None or (problem and not beyond) else ("H1" if beyond else "H0")
    return Evidence(
        instrument="ladder",
        mode=mode,
        statistic_name=f"largest drift at {rungs.upper} over its rounding bound",
        statistic=worst,
        bound=1.0,
        supports=supports,  # type: ignore[arg-type]
        valid=problem is None,
        reason=problem,
        minimum_detectable=float(_bounds_of(excess.rows, bounds, rungs).max()) if len(excess) else None,
        text=text,
        detail={
            "n_pairs": len(excess),
            "n_beyond": beyond,
            "median_slope": slope,
            f"median_slope_{native}_to_{rungs.lower}": first,
            "median_minimum_detectable": float(np.median(list(bounds.values()))) if bounds else None,
            "pinned_floor": floor or ({str(site): rungs.pinned for site in _BEHIND_PINNED} if rungs.pinned else {}),
        },
    )


def _slope(table: DriftTable, mode: str, coarse: str, fine: str) -> float | None:
    """Median slope over the addresses that drift on both rungs, None if there is no such address."""
    width = math.log(UNIT_ROUNDOFF[coarse] / UNIT_ROUNDOFF[fine])
    lower, upper = (_drifting(table.select(mode, rung)) for rung in (coarse, fine))
    at = upper.find(lower.key)
    ratios = lower.rel_l2[at >= 0] / upper.rel_l2[at[at >= 0]]
    slopes = [math.log(ratio) / width for ratio in ratios.tolist()]
    return float(np.median(slopes)) if slopes else None


def _drifting(rows: Rows) -> Rows:
    return rows.where((rows.rel_l2 > 0.0) & (rows.rel_l2 < math.inf))


def _figure(value: float | None) -> str:
    return "not defined (no pair drifts on both)" if value is None else f"{value:.2f}"


class Ladder(Blind):
    """Climbs the precision ladder; `Seen.found` is the `Climb`."""

    name: ClassVar[str] = "ladder"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge every pair by how its drift changes from the coarse rung to the fine one."""
        off = run.plan.ladder == "off"
        found = not_climbed(mode) if off else climb(run.table, mode, run.info.dtype, run.info.ladder, run.floors)
        return Seen(evidence=(found.evidence,), found=found)


def climb_in(panel: Panel, mode: str) -> Climb:
    """Return what the ladder found in a mode."""
    found = panel.seen(Ladder.name, mode).found
    assert isinstance(found, Climb)
    return found
