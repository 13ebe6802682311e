"""Instrument 2, the precision ladder: rounding shrinks with the unit roundoff, a wrong formula does not.

Both passes run again with the same weights at float32 and float64. A drift that rounding makes is proportional to the
unit roundoff u: log drift over log u has slope 1. A drift that a fault makes stays where it is: slope 0. The
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
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from kvdrift.compare.drift import NO_LAYER, DriftRow, DriftTable
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import SELF_NOISE, Mode
from kvdrift.vocabulary.precision import LOWER, RUNGS, UNIT_ROUNDOFF, UPPER, Rungs
from kvdrift.vocabulary.sites import Site, forward_rank

Key = tuple[str, int, int, str]  # prompt, position, layer, site


def rank_of(key: Key) -> tuple[int, int]:
    """Return where an address stands in forward order: its layer and its site."""
    return forward_rank(None if key[2] == NO_LAYER else key[2], Site(key[3]))


# Two prefills that differ by more than this many float32 roundings do not differ because an operation is pinned.
_PINNED_MOST = 64.0

# Sites that an operation pinned inside the feed-forward part reaches within its own layer.
_BEHIND_PINNED = (Site.MLP_OUT, Site.LAYER_OUT)

# The chance that a vector of few elements is shorter than its bound allows for.
_SHORT = 1e-6

# A pinned operation can make decode drift more than two prefills do (other kernels, fewer rows): this many times more.
_PINNED_MARGIN = 32.0


@dataclass(frozen=True, slots=True)
class Climb:
    """What the ladder found in one mode.

    `excess` is drift over bound at the fine rung by address; above 1 is beyond rounding. `bounds` are by (layer, site).
    """

    mode: str
    excess: dict[Key, float]
    bounds: dict[tuple[int, str], float]
    evidence: Evidence


def climb(table: DriftTable, mode: str, native: str, rungs: Rungs = RUNGS) -> Climb:
    """Judge every pair of `mode` by how its drift changes from the coarse rung to the fine one."""
    lower, upper = table.select(mode, rungs.lower), table.select(mode, rungs.upper)
    wanted = table.select(mode, native)
    floor = _pinned_floor(table, rungs)
    bounds = _bounds(lower, floor, rungs, mode)
    excess = {key: excess_of(row, bounds, rungs) for key, row in upper.items() if (row.layer, row.site) in bounds}
    missing = len(wanted.keys() - (excess.keys() & lower.keys()))
    if not excess or missing:
        what = f"{missing} of {len(wanted)} pairs were not measured at {rungs.lower} and {rungs.upper}"
        return Climb(mode, excess, bounds, _evidence(mode, excess, bounds, lower, upper, native, table, what, rungs))
    return Climb(mode, excess, bounds, _evidence(mode, excess, bounds, lower, upper, native, table, None, rungs))


def not_climbed(mode: str) -> Climb:
    """What there is to say of a ladder that was switched off: nothing was measured, and nothing is claimed."""
    reason = "switched off (--ladder off)"
    return Climb(
        mode,
        {},
        {},
        Evidence(
            instrument="ladder",
            mode=mode,
            statistic_name="largest drift at the fine rung over its rounding bound",
            statistic=None,
            bound=1.0,
            valid=False,
            reason=reason,
            text=reason,
        ),
    )


def rounding_bounds(table: DriftTable, mode: str, rungs: Rungs = RUNGS) -> dict[tuple[int, str], float]:
    """Return the bounds of `mode` by (layer, site), from what the table holds so far."""
    return _bounds(table.select(mode, rungs.lower), _pinned_floor(table, rungs), rungs, mode)


def control_excess(
    table: DriftTable, mode: str, bounds: dict[tuple[int, str], float], rungs: Rungs = RUNGS
) -> dict[Key, float]:
    """Return the excess of the positive control's pairs under the bounds of the clean climb."""
    return {
        key: excess_of(row, bounds, rungs)
        for key, row in table.select(mode, rungs.upper).items()
        if (row.layer, row.site) in bounds
    }


def _bounds(
    lower: dict[Key, DriftRow], floor: dict[str, float], rungs: Rungs, mode: str
) -> dict[tuple[int, str], float]:
    """The largest relative drift at the fine rung that rounding may cause, by layer and site.

    The drift at the coarse rung is pooled over prompts and positions: one address may agree by luck.
    """
    largest: dict[tuple[int, str], float] = defaultdict(float)
    for row in lower.values():
        place = (row.layer, row.site)
        largest[place] = max(largest[place], row.rel_l2 if math.isfinite(row.rel_l2) else 0.0)
    coarse, fine = UNIT_ROUNDOFF[rungs.lower], UNIT_ROUNDOFF[rungs.upper]
    shrink = math.sqrt(fine / coarse)
    return {
        place: max(
            shrink * max(drift, coarse), _PINNED_MARGIN * floor.get(place[1], 0.0), _pinned_at(place[1], rungs, mode)
        )
        for place, drift in largest.items()
    }


def _pinned_at(site: str, rungs: Rungs, mode: str) -> float:
    """What a pinned operation that the engine has named may do to a site: one of its roundings.

    With aligned inputs it stays behind that operation; as designed, every later layer inherits it.
    """
    return rungs.pinned if mode != Mode.KV_ALIGNED or site in _BEHIND_PINNED else 0.0


def _pinned_floor(table: DriftTable, rungs: Rungs) -> dict[str, float]:
    """Drift at float64 between two prefills, by site, where float64 rounding cannot make it: something is pinned.

    Where the rungs are others nothing is lifted, so nothing can have been left behind.
    """
    if (rungs.lower, rungs.upper) != (LOWER, UPPER):
        return {}
    least = math.sqrt(UNIT_ROUNDOFF[LOWER] * UNIT_ROUNDOFF[UPPER])
    most = _PINNED_MOST * UNIT_ROUNDOFF[LOWER]
    floor: dict[str, float] = defaultdict(float)
    for row in table.select(SELF_NOISE, UPPER).values():
        if least < row.rel_l2 <= most:
            floor[row.site] = max(floor[row.site], row.rel_l2)
    return dict(floor)


def find_unstable_prefill(table: DriftTable, rungs: Rungs = RUNGS) -> DriftRow | None:
    """Return where, at float64, prefill of one token differs by more than a pinned operation can make it when other
    tokens follow, first in forward order; None if it does not.

    Such a prefill is no function of its tokens so far (attention in both directions, tables that depend on the length),
    and no reference for a decode step.
    """
    if (rungs.lower, rungs.upper) != (LOWER, UPPER):
        return None
    found = [
        row for row in table.select(SELF_NOISE, UPPER).values() if row.rel_l2 > _PINNED_MOST * UNIT_ROUNDOFF[LOWER]
    ]
    return min(found, key=lambda row: row.address.forward_rank, default=None)


def excess_of(row: DriftRow, bounds: dict[tuple[int, str], float], rungs: Rungs = RUNGS) -> float:
    """Return the drift of an address at the fine rung over its bound; above 1 is beyond rounding."""
    return row.rel_l2 / _bound_of(row, bounds, rungs)


def _bound_of(row: DriftRow, bounds: dict[tuple[int, str], float], rungs: Rungs) -> float:
    return bounds[row.layer, row.site] * (1.0 if rungs.upper == UPPER else _SHORT ** (-1.0 / row.n_elements))


def _evidence(
    mode: str,
    excess: dict[Key, float],
    bounds: dict[tuple[int, str], float],
    lower: dict[Key, DriftRow],
    upper: dict[Key, DriftRow],
    native: str,
    table: DriftTable,
    problem: str | None,
    rungs: Rungs,
) -> Evidence:
    worst = max(excess.values(), default=None)
    beyond = sum(not value <= 1.0 for value in excess.values())
    slope = _slope(lower, upper, rungs.lower, rungs.upper)
    is_below = native in UNIT_ROUNDOFF and native not in (rungs.lower, rungs.upper)
    first = _slope(table.select(mode, native), lower, native, rungs.lower) if is_below else None
    floor = _pinned_floor(table, rungs)
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
        minimum_detectable=max(
            (_bound_of(row, bounds, rungs) for row in upper.values() if (row.layer, row.site) in bounds), default=None
        ),
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


def _slope(lower: dict[Key, DriftRow], upper: dict[Key, DriftRow], coarse: str, fine: str) -> float | None:
    """Median slope over the addresses that drift on both rungs, None if there is no such address."""
    width = math.log(UNIT_ROUNDOFF[coarse] / UNIT_ROUNDOFF[fine])
    slopes = [
        math.log(row.rel_l2 / upper[key].rel_l2) / width
        for key, row in lower.items()
        if key in upper and 0.0 < row.rel_l2 < math.inf and 0.0 < upper[key].rel_l2 < math.inf
    ]
    return float(np.median(slopes)) if slopes else None


def _figure(value: float | None) -> str:
    return "not defined (no pair drifts on both)" if value is None else f"{value:.2f}"
