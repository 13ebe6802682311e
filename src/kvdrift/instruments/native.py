"""What half-precision rounding cannot do, at the native dtype alone, with aligned inputs.

In kv_aligned a layer's decode step starts from the same bits as prefill. Walking through the layer, a site is *fresh*
if everything it is computed from has the same bits in both passes; what differs at a fresh site was made between its
inputs and itself, and its noise is known:

* rows of the cache that decode did not write are the same bytes: noise zero;
* row-wise operations (norms, rotation, residual sums) are computed per token in float32 and rounded to the native
  dtype. Another batch shape may move the float32 result by some float32 roundings, which flips the rounding to the
  native dtype in a share u32 / u of the elements per rounding: the number of flipped elements of a layer's site has a
  Poisson bound. More flips mean other code, which may still be right, such as a fused norm that rounds once instead of
  twice; it is a fault if it differs by more than a rounding, or if its rows are off by a factor of one sign;
* products with a weight matrix are accumulated in float32 and rounded once: two of them differ by a rounding of the
  native dtype at most, where they differ. Rounding to nearest favours no factor, and a kernel that truncates makes its
  results smaller by a known share of the roundoff: a factor beyond that in all rows is a fault of its own.

Sites that are not fresh are inherited and not judged here. Valid for bfloat16 and float16: at float32 the accumulation
itself rounds as coarsely as the result, and the ladder decides.

An engine with quantised weights hands float32 values from one operation to the next and rounds inside of them, each
kind of operation in its own way. It says how (`Roundoffs`): row-wise operations may then differ by some float32
roundings, products by the rounding of their activations, attention and the cache by theirs. Few of its sites are fresh;
the others are judged by what their inputs differ by (`kvdrift.instruments.carried`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from kvdrift.compare.drift import NO_LAYER, DriftRow, DriftTable
from kvdrift.instruments.carried import Carried, judge_carried
from kvdrift.instruments.ladder import Key, rank_of
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.precision import (
    ATTENTION_ROUNDINGS,
    HALF,
    PRODUCT_ROUNDINGS,
    ROW_WISE_ROUNDINGS,
    UNIT_ROUNDOFF,
    Roundoffs,
    configured_bound,
)
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, PARENTS, ROW_WISE, STATE_SITES, Site

Place = tuple[int, str]  # layer, site

# Two right ways to round a row-wise result are this many native roundings apart at most.
_ROW_WISE_DIFFERENCE = 2.0
# A common factor must be this clear, in standard errors over (prompt, position) units, and this large, in roundings.
_FACTOR_DEVIATIONS = 10.0
_LEAST_FACTOR = 1.0 / 128.0
# Truncation takes half a step of the dtype off on average, which is u / m of a result with mantissa m from 1 to 2: over
# mantissas whose logarithms are uniform, u / (2 ln 2).
_TRUNCATED = 1.0 / (2.0 * math.log(2.0))
# The mean factor of a product must be beyond that by so many standard errors over (prompt, position) units.
_GAIN_DEVIATIONS = 6.0


@dataclass(frozen=True, slots=True)
class Gain:
    """A common relative error of all rows of a place, its standard error over units, and the share that it explains."""

    mean: float
    error: float
    explained: float


@dataclass(frozen=True, slots=True)
class NativeFindings:
    """`excess` by (layer, site): what was seen over what rounding can do; `first` an address of each place beyond, and
    `gains` the factor of each product that is off by one."""

    excess: dict[Place, float]
    first: dict[Place, Key]
    evidence: Evidence
    gains: dict[Place, Gain] = field(default_factory=dict)


def judge_native(table: DriftTable, mode: str, native: str, roundoffs: Roundoffs | None = None) -> NativeFindings:
    """Judge the fresh sites of `mode` at the native dtype; abstains where that is no half one and has no roundoffs."""
    if native not in HALF and roundoffs is None:
        return NativeFindings(
            {}, {}, _abstain(mode, f"{native} accumulates as coarsely as it rounds; the ladder decides")
        )
    rows = table.select(mode, native)
    lost = _lost(table, mode, native)
    fresh: dict[Place, list[DriftRow]] = defaultdict(list)
    carried: dict[Place, list[tuple[Key, Carried]]] = defaultdict(list)
    for row in rows.values():
        if _is_fresh(row, rows, lost):
            fresh[row.layer, row.site].append(row)
        elif roundoffs is not None and (found := judge_carried(row, rows, lost, roundoffs)) is not None:
            carried[row.layer, row.site].append((row.key, found))
    copied = {place for place, found in fresh.items() if all(_is_copy(row, rows) for row in found)}
    excess = {place: _excess(found, native, roundoffs, place in copied) for place, found in fresh.items()}
    first = {
        place: _first(fresh[place], native, roundoffs, place in copied)
        for place, value in excess.items()
        if value > 1.0
    }
    for place, items in carried.items():
        excess[place] = max(excess.get(place, 0.0), *(item.excess for _, item in items))
        worse = next((key for key, item in items if not item.excess <= 1.0), None)
        if worse is not None:
            first.setdefault(place, worse)
    gains = {
        place: gain
        for place in first
        if roundoffs is None
        and (gain := _gain(fresh[place])) is not None
        and _is_product(Site(place[1]))
        and _beyond_truncation(gain, UNIT_ROUNDOFF[native]) > 1.0
    }
    n_places = len({(row.layer, row.site) for row in rows.values()})
    worst = max(excess.values(), default=None)
    return NativeFindings(
        excess,
        first,
        Evidence(
            instrument="native",
            mode=mode,
            statistic_name="largest difference at a site with equal inputs over what rounding can do there",
            statistic=worst,
            bound=1.0,
            supports=None if worst is None else ("H1" if worst > 1.0 else "H0"),
            valid=worst is not None,
            reason=None if worst is not None else "no site had the same bits going in",
            minimum_detectable=_minimum(fresh, carried, native, roundoffs),
            text=f"{len(first)} of {len(excess)} layer sites with {inputs_of(roundoffs)} differ beyond rounding at "
            f"{native}",
            detail={
                "n_judged": len(excess),
                "n_places": n_places,
                "n_beyond": len(first),
                "n_pairs": sum(map(len, fresh.values())) + sum(map(len, carried.values())),
            },
        ),
        gains,
    )


def inputs_of(roundoffs: Roundoffs | None) -> str:
    """What the sites that are judged have in common, in words."""
    return "equal inputs" if roundoffs is None else "equal or nearly equal inputs"


def fresh_keys(table: DriftTable, mode: str, native: str, roundoffs: Roundoffs | None = None) -> list[Key]:
    """Return the addresses of `mode` that have equal inputs, and so are judged here."""
    if native not in HALF and roundoffs is None:
        return []
    rows = table.select(mode, native)
    lost = _lost(table, mode, native)
    return [key for key, row in rows.items() if _is_fresh(row, rows, lost)]


def least_seen(site: Site, native: str, roundoffs: Roundoffs | None = None) -> float:
    """The smallest relative change of all elements of `site` that is beyond rounding at a fresh address."""
    if site is Site.ATTN_CTX:
        return ATTENTION_ROUNDINGS * (UNIT_ROUNDOFF[native] if roundoffs is None else roundoffs.attention)
    if roundoffs is not None:
        row_wise, product = ROW_WISE_ROUNDINGS * roundoffs.row_wise, PRODUCT_ROUNDINGS * roundoffs.product
    else:
        row_wise, product = (n * UNIT_ROUNDOFF[native] for n in (_ROW_WISE_DIFFERENCE, PRODUCT_ROUNDINGS))
    return row_wise if site in ROW_WISE else product


def beyond_alone(rows: dict[Key, DriftRow], native: str, roundoffs: Roundoffs | None = None) -> list[Key]:
    """Return the addresses that are fresh and beyond rounding each by itself, before they are pooled over units."""
    if native not in HALF and roundoffs is None:
        return []
    return [
        key for key, row in rows.items() if not row.equal and not _excess_alone(row, rows, native, roundoffs) <= 1.0
    ]


def _excess_alone(row: DriftRow, rows: dict[Key, DriftRow], native: str, roundoffs: Roundoffs | None) -> float:
    """The difference at one address over what rounding can do there, 0 if that is not known."""
    if _is_fresh(row, rows, set()):
        return _excess([row], native, roundoffs, _is_copy(row, rows))
    found = None if roundoffs is None else judge_carried(row, rows, set(), roundoffs)
    return 0.0 if found is None else found.excess


def _minimum(
    fresh: dict[Place, list[DriftRow]],
    carried: dict[Place, list[tuple[Key, Carried]]],
    native: str,
    roundoffs: Roundoffs | None,
) -> float:
    """The smallest relative difference that is beyond rounding wherever it is, of the sites that are judged here.

    What lies behind a fault, in the same layer, is bounded by what the fault did, and left out.
    """
    if roundoffs is None:
        return PRODUCT_ROUNDINGS * UNIT_ROUNDOFF[native]
    enters: dict[tuple[str, int, int], tuple[int, int]] = {}
    for key, item in (pair for items in carried.values() for pair in items):
        if not item.excess <= 1.0:
            enters[key[:3]] = min(rank_of(key), enters.get(key[:3], rank_of(key)))
    for row in (row for rows in fresh.values() for row in rows):
        if not _excess([row], native, roundoffs) <= 1.0:
            enters[row.key[:3]] = min(rank_of(row.key), enters.get(row.key[:3], rank_of(row.key)))
    bounds = [configured_bound(Site(site), roundoffs) for _, site in fresh]
    bounds += [
        item.bound
        for items in carried.values()
        for key, item in items
        if key[:3] not in enters or rank_of(key) <= enters[key[:3]]
    ]
    return max(bounds, default=0.0)


def _lost(table: DriftTable, mode: str, native: str) -> set[Key]:
    """Addresses that one side has and that could not be compared."""
    return {
        (value.prompt, value.position, NO_LAYER if value.layer is None else value.layer, str(value.site))
        for label, rung, value in table.unpaired
        if (label, rung) == (mode, native)
    }


def _is_fresh(row: DriftRow, rows: dict[Key, DriftRow], lost: set[Key]) -> bool:
    """Whether everything that the site is computed from has the same bits in both passes."""
    site = Site(row.site)
    if row.layer == NO_LAYER:
        # Layer isolation gives the final norm what prefill's last layer handed on; the embedding reads token ids.
        if site is Site.FINAL_NORM_OUT:
            return any(key[:2] == (row.prompt, row.position) and key[3] == Site.LAYER_OUT for key in rows)
        return site is not Site.LOGITS or _equal(row, Site.FINAL_NORM_OUT, rows, lost)
    if site is Site.LAYER_OUT and not any(_recorded(row, parent, rows) for parent in PARENTS[site]):
        return False  # of a layer that was not recorded the boundaries alone are known, and all of it lies between them
    return site in PARENTS and all(_equal(row, parent, rows, lost) for parent in PARENTS[site])


def _recorded(row: DriftRow, site: Site, rows: dict[Key, DriftRow]) -> bool:
    return (row.prompt, row.position, row.layer, str(site)) in rows


def _equal(row: DriftRow, parent: Site, rows: dict[Key, DriftRow], lost: set[Key]) -> bool:
    key = (row.prompt, row.position, row.layer, str(parent))
    if key in lost:
        return False  # it is there, and could not be compared
    found = rows.get(key)
    if found is not None:
        # What went into the layer is prefill's own value, whatever the layer below handed over.
        return found.equal or parent is Site.LAYER_IN
    if parent is Site.LAYER_IN or parent not in PARENTS:
        return parent is not Site.FINAL_NORM_OUT
    return all(_equal(row, grandparent, rows, lost) for grandparent in PARENTS[parent])


def _is_copy(row: DriftRow, rows: dict[Key, DriftRow]) -> bool:
    """Whether it is a cached row of which is known what was stored."""
    return row.site in CACHE_SITES and all(_recorded(row, parent, rows) for parent in PARENTS[Site(row.site)])


def _excess(rows: list[DriftRow], native: str, roundoffs: Roundoffs | None, is_copy: bool = False) -> float:
    """The difference at one layer's site, over all its fresh pairs, in units of what rounding can do.

    `is_copy` says that the site holds what was stored there, and that this had the same bits.
    """
    site = Site(rows[0].site)
    if any(row.n_lost or math.isinf(row.rel_l2) for row in rows):
        return math.inf
    if roundoffs is not None:
        return _configured_excess(rows, site, roundoffs)
    unit = UNIT_ROUNDOFF[native]
    if site in CACHE_SITES:
        # Only the row of the token itself may differ, and not even that if the key that was stored did not.
        if any(row.n_bad_past for row in rows):
            return math.inf
        return max(_relative(rows, PRODUCT_ROUNDINGS * unit), _flips(rows, unit) if is_copy else 0.0)
    if site in ROW_WISE:
        return min(_flips(rows, unit), max(_relative(rows, _ROW_WISE_DIFFERENCE * unit), _common_factor(rows, unit)))
    if site is Site.ATTN_PROBS:
        return _relative(rows, 4.0 * ATTENTION_ROUNDINGS * UNIT_ROUNDOFF.get(rows[0].dtype, unit))
    if site is Site.ATTN_CTX:
        return _relative(rows, ATTENTION_ROUNDINGS * unit)
    apart = _relative(rows, PRODUCT_ROUNDINGS * UNIT_ROUNDOFF.get(rows[0].dtype, unit))
    gain = _gain(rows) if _is_product(site) else None
    return apart if gain is None else max(apart, _beyond_truncation(gain, unit))


def _configured_excess(rows: list[DriftRow], site: Site, roundoffs: Roundoffs) -> float:
    """The same where every kind of operation has a roundoff of its own and hands on float32 values."""
    if site in CACHE_SITES and any(row.n_bad_past for row in rows):
        return math.inf
    return _relative(rows, configured_bound(site, roundoffs))


def _first(rows: list[DriftRow], native: str, roundoffs: Roundoffs | None, is_copy: bool) -> Key:
    """The first pair that is beyond rounding by itself; where only their number is, the first that differs."""
    alone = next((row.key for row in rows if _excess([row], native, roundoffs, is_copy) > 1.0), None)
    return alone or next(row.key for row in rows if not row.equal)


def _flips(rows: list[DriftRow], unit: float) -> float:
    expected = ROW_WISE_ROUNDINGS * UNIT_ROUNDOFF["float32"] / unit * sum(row.n_elements for row in rows)
    flipped = sum(row.n_differ for row in rows)
    # Six standard deviations of a Poisson count, and three for the smallest counts: p below 1e-8.
    return flipped / (expected + 6.0 * math.sqrt(expected) + 3.0)


def _common_factor(rows: list[DriftRow], unit: float) -> float:
    """How clearly the rows are all off by a factor of the same sign: rounding leaves the factor's sign to chance."""
    gains = np.array([row.gain for row in rows])
    if len(gains) < 2 or not np.isfinite(gains).all() or abs(float(gains.mean())) < unit * _LEAST_FACTOR:
        return 0.0
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    return math.inf if error == 0.0 else abs(float(gains.mean())) / error / _FACTOR_DEVIATIONS


def _is_product(site: Site) -> bool:
    """Whether a site is a product with a weight matrix, whose rows carry no freedom such as the shift of scores."""
    return site not in ROW_WISE | CACHE_SITES | ATTENTION_ROW_SITES | STATE_SITES | {Site.ATTN_CTX}


def _gain(rows: list[DriftRow]) -> Gain | None:
    """The common factor of the rows of a place; None for a single unit, whose spread is not known."""
    gains = np.array([row.gain for row in rows])
    if len(gains) < 2 or not np.isfinite(gains).all():
        return None
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(len(gains))
    squared = float(sum(row.rel_l2**2 for row in rows))
    explained = (
        0.0
        if squared == 0.0
        else 1.0 - float(sum(row.rel_l2**2 - (2.0 * row.gain - mean) * mean for row in rows)) / squared
    )
    return Gain(mean, error, explained)


def _beyond_truncation(gain: Gain, unit: float) -> float:
    """How far a factor is, with near certainty, beyond what truncation in one of two kernels does."""
    return max(0.0, abs(gain.mean) - _GAIN_DEVIATIONS * gain.error) / (_TRUNCATED * unit)


def _relative(rows: list[DriftRow], bound: float) -> float:
    return max(row.rel_l2 for row in rows) / bound


def _abstain(mode: str, reason: str) -> Evidence:
    return Evidence(
        instrument="native",
        mode=mode,
        statistic_name="largest difference at a site with equal inputs over what rounding can do there",
        statistic=None,
        bound=1.0,
        valid=False,
        reason=reason,
        text=reason,
    )
