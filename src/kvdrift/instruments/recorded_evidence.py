"""How recorded traces are judged, and what is said of it: the terms, and the evidence in words."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from kvdrift.instruments.walk import GROWTH, Index
from kvdrift.pairing.rows import Bools, Floats, Rows
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES

# Roundings by which two right ways to compute a site may differ in the 2-norm, in units of the roundoff: half precision
# accumulates in float32 and rounds once or a few times, attention also its probabilities or its scores; at full
# precision a sum of n terms loses lambda * sqrt(n) roundings (Higham & Mary 2019, theorem 3.1), here with lambda = 8
# and n = 2^16.
_HALF = {"row": 2.0, "product": 4.0, "attention": 8.0}
_FULL = {"row": 64.0, "product": 2048.0, "attention": 2048.0}
# Decode may drift more than two prefills of one token do: other kernels, fewer rows.
SELF_NOISE_MARGIN = 8.0


@dataclass(frozen=True, slots=True)
class Terms:
    """How to judge foreign values.

    Attributes:
        mode: the mode that is judged.
        rung: the rung of the values in the files.
        arithmetic: how the engine rounds.
        is_assumed: whether the files do not say so, and the coarsest dtype that their values allow was assumed.
        n_layers: the number of layers, 0 if it is not known.
        covers_carried: whether sites with unequal inputs are covered by the growth of their drift.
    """

    mode: str
    rung: str
    arithmetic: Arithmetic
    is_assumed: bool
    n_layers: int
    covers_carried: bool = False

    @property
    def roundings(self) -> dict[str, float]:
        """How many roundings are allowed, by kind of operation."""
        return _HALF if self.arithmetic.can_judge else _FULL


def ratios_of(rows: Rows, bound: Floats) -> Floats:
    """The drift of each pair over its bound, [pair]; without meaning where the bound is NaN."""
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = rows.rel_l2 / bound
    is_gross = (rows.n_lost > 0) | np.isinf(rows.rel_l2) | (bound == 0.0)
    return np.where(rows.equal, 0.0, np.where(is_gross, math.inf, ratio))


def fresh_evidence(terms: Terms, rows: Rows, excess: Floats, beyond: Index, n_judged: int) -> Evidence:
    worst = float(excess.max()) if len(excess) else None
    n_places = len(rows.places)
    assumed = ", the coarsest dtype that the values allow; the files name none" if terms.is_assumed else ""
    return Evidence(
        instrument="native",
        mode=terms.mode,
        statistic_name="largest difference at a site over what rounding can do there, given its inputs",
        statistic=worst,
        bound=1.0,
        supports=None if worst is None else ("H1" if len(beyond) else "H0"),
        valid=worst is not None,
        reason=None if worst is not None else "no site has recorded inputs that agree closely enough in both passes",
        minimum_detectable=terms.roundings["product"] * terms.arithmetic.unit,
        text=f"{len(beyond)} of {len(excess)} values with known inputs, at {n_judged} of {n_places} layer sites, "
        f"differ beyond rounding at {terms.arithmetic.dtype}{assumed}",
        detail={"n_judged": n_judged, "n_places": n_places, "n_beyond": len(np.unique(rows.place[beyond]))},
    )


def noise_evidence(terms: Terms, worst: float, noise: Mapping[Place, float]) -> Evidence:
    """How the drift of sites with unequal inputs compares with the self-noise; it can only speak for H0."""
    return Evidence(
        instrument="self_noise",
        mode=terms.mode,
        statistic_name=f"largest drift with unequal inputs over {SELF_NOISE_MARGIN:.0f} times the self-noise there",
        statistic=worst,
        bound=1.0,
        supports="H0" if worst <= 1.0 else None,
        minimum_detectable=SELF_NOISE_MARGIN * max(noise.values()),
        text=f"two prefills of one token differ at {sum(value > 0.0 for value in noise.values())} of {len(noise)} "
        f"layer sites; decode drifts at most {worst:.2g} of what {SELF_NOISE_MARGIN:.0f} times that allows",
    )


def promise_evidence(terms: Terms, rows: Rows) -> Evidence:
    """That the steps of kv_aligned were taken on other rows than those that prefill wrote."""
    reads = rows.where(rows.is_at(*CACHE_SITES))
    is_bad = reads.n_bad_past > 0
    text = (
        f"the promise of kv_aligned does not hold: in {int(is_bad.sum())} of {len(reads)} cache reads the rows of "
        f"earlier tokens are not the bytes that prefill wrote (they drift up to {float(reads.rel_l2[is_bad].max()):.2g}"
        "), as after a prefill of the tokens before; take the step after a rewind of the prefill of all tokens, or "
        "record it as as_designed"
    )
    name = "cache reads whose earlier rows are prefill's own"
    return Evidence.abstain("promise", terms.mode, name, text)


def carried_evidence(terms: Terms, rows: Rows, carried: Floats, is_uncovered: Bools) -> Evidence:
    """How the drift of sites with unequal inputs compares with what an operation makes of it; it can only speak for
    H0."""
    excess = ratios_of(rows, carried)[is_uncovered]
    worst = math.inf if np.isnan(excess).any() else float(excess.max(initial=0.0))
    bounds = carried[is_uncovered & ~np.isnan(carried)]
    return Evidence(
        instrument="carried",
        mode=terms.mode,
        statistic_name=f"largest drift with unequal inputs over {GROWTH:.0f} times the drift of these inputs",
        statistic=worst,
        bound=1.0,
        supports="H0" if worst <= 1.0 else None,
        minimum_detectable=float(bounds.max()) if len(bounds) else None,
        text=f"{int(is_uncovered.sum())} values have inputs that differ; they drift at most {worst:.2g} of what "
        f"rounding and {GROWTH:.0f} times the drift of these inputs allow",
    )
