"""The directed tests of replay: is a known cause in decode's attention error, and how much of it?

Each unit, a (prompt, position) pair, gives one coefficient a cause: decode's less prefill's, at each layer and pooled
over layers. Under H0 both passes only round, in no preferred direction, so the difference is symmetric around zero and
its signs may be flipped. The largest statistic over all causes and layers is compared with its distribution under all
flips, which controls the chance of a false alarm for the whole family.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kvdrift.instruments.ladder import UNIT_ROUNDOFF, Key
from kvdrift.instruments.native import HALF
from kvdrift.instruments.replay import Coefficients, ReplayRow, coefficients
from kvdrift.replay.causes import ATTENTION_CAUSES
from kvdrift.sites import Site
from kvdrift.stats import sign_flip_max_t
from kvdrift.trace.model import Roundoffs
from kvdrift.verdict.model import Evidence

# A relative cause smaller than this share of the native roundoff is not called a fault: kernels may hold constants such
# as log2(e) in float32, which is a bias that is none.
_RELEVANT = 1.0 / 256.0
# The same where the engine has kernels of its own for one token and for many, which need not round alike: as a share of
# the roundoff of attention.
_RELEVANT_CONFIGURED = 1.0
# Standard errors at which a coefficient is sure to be seen.
_CLEAR = 6.0
# A cause that happens or not is taken to have happened from here.
_HAPPENED = 0.5

# Mean error over sum |p| |v| that rounding cannot reach, in units of the native roundoff. Kernels that round the
# probabilities to the native dtype reach 2.5 of them at single addresses.
_MOST_ROUNDINGS = 16.0

_SITE = {
    "score_scale": Site.ATTN_SCORES,
    "softcap_missing": Site.ATTN_SCORES,
    "heads_tiled": Site.ATTN_SCORES,
    "sink_missing": Site.ATTN_PROBS,
    "sink_doubled": Site.ATTN_PROBS,
}


@dataclass(frozen=True, slots=True)
class Directed:
    """A cause that was found: `size` is its coefficient, `layer` the lowest layer it is seen in."""

    cause: str
    layer: int
    size: float
    interval: tuple[float, float]
    p_value: float
    address: Key


@dataclass(frozen=True, slots=True)
class ReplayFindings:
    """What replay found in one mode; `beyond` holds addresses whose attention error no rounding explains."""

    causes: tuple[Directed, ...]
    beyond: dict[Key, float]
    evidence: tuple[Evidence, ...]


def judge_replay(
    rows: Sequence[ReplayRow],
    mode: str,
    native: str,
    alpha: float,
    seed: int,
    roundoffs: Roundoffs | None = None,
    *,
    is_specified: bool = False,
) -> ReplayFindings:
    """Judge the replays of `mode` at the native dtype, which has one unit roundoff or several of its own.

    `is_specified` says that how a layer attends was seen whole, where it is called. Then an error that prefill shares
    is a fault of both. Otherwise it may as well be something that the specification leaves out, and is excused.
    """
    rows = [row for row in rows if row.mode == mode]
    if not rows:
        reason = "attention could not be replayed: no layer showed its query, keys, values and how it attends"
        return ReplayFindings((), {}, (_evidence(mode, "replay", None, valid=False, reason=reason),))
    unit = UNIT_ROUNDOFF[native] if roundoffs is None else roundoffs.attention
    beyond: dict[Key, float] = {}
    bounds = [_bound(row, unit) for row in rows]
    for row, bound in zip(rows, bounds, strict=True):
        error = row.error["decode"]
        if not error <= bound and (is_specified or not error <= 2.0 * row.error["prefill"]):
            beyond[row.prompt, row.position, row.layer, str(Site.ATTN_CTX)] = error / bound
    n_shared = sum(
        not row.error["prefill"] <= bound and row.error["decode"] > bound
        for row, bound in zip(rows, bounds, strict=True)
    )
    shared = f"; at {n_shared} places prefill is off as well" if n_shared else ""
    worst = float(np.max([row.error["decode"] / bound for row, bound in zip(rows, bounds, strict=True)]))
    size = _evidence(
        mode,
        "replay",
        worst,
        supports="H1" if beyond else "H0",
        minimum_detectable=max(bounds),
        text=f"largest attention error of decode against float64 on its own operands: {100.0 * worst:.2g} % of what "
        f"rounding of scores, probabilities and output can do{shared}",
        detail={"n_beyond": len(beyond), "n_shared": n_shared},
    )
    if native not in HALF and roundoffs is None:
        reason = f"kernels at {native} may hold constants rounded as coarsely as it; the ladder decides"
        return ReplayFindings((), beyond, (size, _evidence(mode, "directed", None, valid=False, reason=reason)))
    least = unit * (_RELEVANT if roundoffs is None else _RELEVANT_CONFIGURED)
    causes, directed = _directed(rows, mode, least, unit, alpha, seed)
    return ReplayFindings(causes, beyond, (size, directed))


def _bound(row: ReplayRow, unit: float) -> float:
    """The mean error over sum |p| |v| that rounding cannot reach at this address."""
    return _MOST_ROUNDINGS * unit + row.from_scores


def _directed(
    rows: Sequence[ReplayRow], mode: str, least: float, unit: float, alpha: float, seed: int
) -> tuple[tuple[Directed, ...], Evidence]:
    units = sorted({row.unit for row in rows})
    found = coefficients(rows, units)
    if len(units) < 2 or not found:
        reason = f"{len(units)} (prompt, position) units; two are needed"
        return (), _evidence(mode, "directed", None, valid=False, reason=reason)
    values = np.array([item.decode - item.prefill for item in found])
    test = sign_flip_max_t(values, seed=seed)
    relevant = [
        index for index, item in enumerate(found) if test.p_values[index] <= alpha and _is_relevant(item, least)
    ]
    causes = _name(relevant, found, test.p_values, rows, units)
    scale = next((i for i, item in enumerate(found) if item.cause == "score_scale" and item.layer is None), None)
    smallest = None if scale is None else _smallest(found[scale], values[scale], least, unit)
    best = int(np.argmin(test.p_values))
    text = (
        "; ".join(f"{c.cause} {c.size:+.2e} from layer {c.layer} on (p {c.p_value:.1e})" for c in causes)
        or f"no cause of the catalogue in {len(found)} tests on {len(units)} units"
    )
    powerless = test.smallest_p > alpha
    return causes, Evidence(
        instrument="directed",
        mode=mode,
        statistic_name="largest t of a cause's coefficient, decode less prefill, over causes and layers",
        statistic=float(test.t[best]),
        p_value=float(test.p_values[best]),
        supports="H1" if causes else ("H0" if not powerless else None),
        valid=not powerless,
        reason=None if not powerless else f"{len(units)} units cannot give a p-value below {test.smallest_p:.1e}",
        minimum_detectable=smallest,
        text=text,
        detail={
            "n_tests": len(found),
            "n_units": len(units),
            "unit": "(prompt, position)",
            "minimum_by_cause": {
                item.cause: _smallest(item, value, least, unit)
                for item, value in zip(found, values, strict=True)
                if item.layer is None
            },
        },
    )


def _is_relevant(item: Coefficients, least: float) -> bool:
    return abs(float((item.decode - item.prefill).mean())) >= _least_size(item.cause, least)


def _least_size(cause: str, least: float) -> float:
    relative = {item.name for item in ATTENTION_CAUSES if item.relative}
    return least if cause in relative else _HAPPENED


def _smallest(item: Coefficients, values: NDArray[np.float64], least: float, unit: float) -> float:
    """The size of a cause that its units, given as differences of coefficients, would show with near certainty.

    Clean passes that agree bit for bit have no spread. A fault takes that agreement away: each pass then rounds its
    outputs by itself, each by up to a roundoff, uniformly, so the error of the mean is at least that of two roundings.
    """
    n_units = len(values)
    spread = float(values.std(ddof=1)) / math.sqrt(n_units)
    rounding = unit * math.sqrt(2.0 / 3.0 * float(np.sum(1.0 / item.size))) / n_units
    return max(_CLEAR * max(spread, rounding), _least_size(item.cause, least))


def _name(
    relevant: list[int], found: list[Coefficients], p_values: object, rows: Sequence[ReplayRow], units: Sequence[object]
) -> tuple[Directed, ...]:
    """Of the causes that were found, keep the one that explains most of the error: directions overlap."""
    if not relevant:
        return ()
    share: dict[str, float] = {}
    for row in rows:
        for cause, value in row.explained.items():
            share[cause] = share.get(cause, 0.0) + value
    names = {found[index].cause for index in relevant}
    best = max(names, key=lambda name: share.get(name, 0.0))
    mine = [index for index in relevant if found[index].cause == best]
    layers = [layer for index in mine if (layer := found[index].layer) is not None]
    lowest = min(layers) if layers else min(row.layer for row in rows)
    # The pooled coefficient is the size of a cause that all layers share; of one in one layer it is a fraction.
    index = next((i for i in mine if found[i].layer is None and len(layers) != 1), None)
    index = next(i for i in mine if found[i].layer is not None or not layers) if index is None else index
    values = found[index].decode - found[index].prefill
    mean, error = float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))
    prompt, position = next((row.prompt, row.position) for row in rows if row.layer == lowest)
    site = _SITE.get(best, Site.ATTN_CTX)
    p_value = float(np.asarray(p_values)[index])
    address = (prompt, position, lowest, str(site))
    return (Directed(best, lowest, mean, (mean - 2.0 * error, mean + 2.0 * error), p_value, address),)


def _evidence(
    mode: str,
    instrument: str,
    statistic: float | None,
    *,
    supports: str | None = None,
    valid: bool = True,
    reason: str | None = None,
    minimum_detectable: float | None = None,
    text: str | None = None,
    detail: dict[str, object] | None = None,
) -> Evidence:
    return Evidence(
        instrument=instrument,
        mode=mode,
        statistic_name="largest attention error of decode over the rounding bound",
        statistic=statistic,
        bound=1.0,
        supports=supports,  # type: ignore[arg-type]
        valid=valid,
        reason=reason,
        minimum_detectable=minimum_detectable,
        text=text or reason or "",
        detail=detail or {},
    )
