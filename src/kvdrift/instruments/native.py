"""What half-precision rounding cannot do, at the native dtype alone, with aligned inputs.

In kv_aligned a layer's decode step starts from the same bits as prefill. Walking through the layer, a site is *fresh*
if everything it is computed from has the same bits in both passes; what differs at a fresh site was made between its
inputs and itself, and its noise is known:

* rows of the cache that decode did not write are the same bytes: noise zero;
* row-wise operations (norms, rotation, residual sums) are computed per token in float32 and rounded to the native
  dtype. Another batch shape may move the float32 result by some float32 roundings, which flips the rounding to the
  native dtype in a share u32 / u of the elements per rounding: the number of flipped elements of a layer's site has a
  Poisson bound. More flips mean other code, which may still be right, such as a fused norm that rounds once instead of
  twice; it is a fault if it differs by more than a rounding, or if its rows are off by a factor of one sign. Few flips
  are no excuse for a difference that no flip makes;
* products with a weight matrix are accumulated in float32 and rounded once: two of them differ by a rounding of the
  native dtype at most, where they differ. Rounding to nearest favours no factor, and a kernel that truncates makes its
  results smaller by a known share of the roundoff: a factor beyond that in all rows is a fault of its own.

Sites that are not fresh are inherited and not judged here. Valid for bfloat16 and float16: at float32 the accumulation
itself rounds as coarsely as the result, and the ladder decides.

An engine with quantised weights hands float32 values from one operation to the next and rounds inside of them, each
kind of operation in its own way. It says how (`Arithmetic`): row-wise operations may then differ by some float32
roundings, products by the rounding of their activations, attention and the cache by theirs. Few of its sites are fresh;
the others are judged by what their inputs differ by (`kvdrift.instruments.carried`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Blind, Directed, Exact, Judges, Panel, Replayed, Run, Seen
from kvdrift.instruments.carried import judge_carried
from kvdrift.instruments.student import chance_of_t
from kvdrift.instruments.walk import Index, Walk
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Bools, Floats, Ints, Rows, layer_keys
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import FACTOR_OF, Cause
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.precision import PRODUCT_ROUNDINGS, ROW_WISE_ROUNDINGS, UNIT_ROUNDOFF, Arithmetic
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES, PARENTS, ROW_WISE, STATE_SITES, Site
from kvdrift.vocabulary.units import Unit

# A common factor must be this clear, in standard errors over (prompt, position) units, and this large, in roundings.
_FACTOR_DEVIATIONS = 10.0
_LEAST_FACTOR = 1.0 / 128.0
# What of a layer is recorded though the layer is not.
_BOUNDARIES = frozenset({Site.LAYER_IN, Site.LAYER_OUT})
# With few units that many standard errors come by chance: so likely may they be at one place, of a thousand places that
# share an alpha of 0.001.
_FACTOR_CHANCE = 1e-6
# Truncation takes half a step of the dtype off on average, which is u / m of a result with mantissa m from 1 to 2: over
# mantissas whose logarithms are uniform, u / (2 ln 2).
_TRUNCATED = 1.0 / (2.0 * math.log(2.0))
# The mean factor of a product must be beyond that by so many standard errors over (prompt, position) units.
_GAIN_DEVIATIONS = 6.0


@dataclass(frozen=True, slots=True)
class Gain:
    """A common relative error of all rows of a place.

    Attributes:
        mean: the error, decode over prefill less 1; positive where decode is larger.
        error: its standard error over (prompt, position) units.
        explained: the share of the squared difference that it removes, at most 1.
    """

    mean: float
    error: float
    explained: float


@dataclass(frozen=True, slots=True)
class NativeFindings:
    """What the native dtype alone shows of one mode.

    Attributes:
        excess: by place, the difference over what rounding can do; above 1 is beyond it.
        first: an address of each place that is beyond.
        gains: the factor of each product that is off by a factor.
    """

    excess: dict[Place, float]
    first: dict[Place, Address]
    evidence: Evidence
    gains: dict[Place, Gain] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Judged:
    """What is judged of some pairs, each an array [pair]: which are fresh, which others are bounded by their inputs,
    and excess and bound of those."""

    is_fresh: Bools
    is_carried: Bools
    excess: Floats
    bound: Floats


def judge_native(
    table: DriftTable,
    mode: str,
    arithmetic: Arithmetic,
    repeated: Collection[Unit] = (),
    cancelling: Collection[Address] = (),
) -> NativeFindings:
    """Judge the fresh sites of `mode` at the native dtype; abstains where its arithmetic cannot judge.

    Units that are `repeated` are judged each by itself, and do not count where units are counted. `cancelling` products
    are left out: what rounds them is the size of their terms; and contexts of operands of 8 bits, which replay judges.
    """
    native = arithmetic.dtype
    if not arithmetic.can_judge:
        why_not = f"{native} accumulates as coarsely as it rounds; the ladder decides"
        return NativeFindings({}, {}, _abstain(mode, why_not))
    rows = table.select(mode, native)
    walk = Walk(rows, table.lost(mode, native))
    judged = _judge(walk, arithmetic, cancelling)
    fresh = dict(rows.where(judged.is_fresh).groups())
    counted = {place: found.where(_counts(found, repeated)) for place, found in fresh.items()}
    passed = {place: _passed(walk, found, arithmetic) for place, found in fresh.items()}
    excess = {
        place: _excess(found, arithmetic, _is_copy(walk, place, found), counted[place], passed[place])
        for place, found in fresh.items()
    }
    first = {
        place: _first(fresh[place], arithmetic, _is_copy(walk, place, fresh[place]), passed[place])
        for place, value in excess.items()
        if value > 1.0
    }
    _add_carried(rows, judged, excess, first)
    gains = _gains({place: counted[place] for place in first if not arithmetic.is_configured}, arithmetic.unit)
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
            minimum_detectable=_minimum(rows, judged, arithmetic, passed),
            text=f"{len(first)} of {len(excess)} layer sites with {inputs_of(arithmetic)} differ beyond rounding at "
            f"{native}",
            detail={
                "n_judged": len(excess),
                "n_places": len(rows.places),
                "n_beyond": len(first),
                **_detail(fresh, judged, arithmetic, passed),
            },
        ),
        gains,
    )


def _gains(rows: Mapping[Place, Rows], unit: float) -> dict[Place, Gain]:
    """The factor of each product of which that is more than truncation makes."""
    return {
        place: gain
        for place, found in rows.items()
        if (gain := _gain(found)) is not None and _is_product(place.site) and _beyond_truncation(gain, unit) > 1.0
    }


def _judge(walk: Walk, arithmetic: Arithmetic, left_out: Collection[Address] = ()) -> _Judged:
    rows = walk.rows
    is_fresh, is_carried = walk.is_fresh(), np.zeros(len(rows), dtype=bool)
    if left_out:
        is_fresh[[address in left_out for address in rows.addresses()]] = False
    excess, bound = np.zeros(len(rows)), np.zeros(len(rows))
    if not arithmetic.is_configured:
        return _Judged(is_fresh, is_carried, excess, bound)
    for site in {place.site for place in rows.places}:
        at = np.flatnonzero(rows.is_at(site) & ~is_fresh)
        found = judge_carried(walk, at, site, arithmetic)
        is_carried[at], excess[at], bound[at] = found.is_bounded, found.excess, found.bound
    return _Judged(is_fresh, is_carried, excess, bound)


def _add_carried(rows: Rows, judged: _Judged, excess: dict[Place, float], first: dict[Place, Address]) -> None:
    """Add what the pairs with unequal inputs show, place by place."""
    at = np.flatnonzero(judged.is_carried)
    carried, values = rows.where(at), judged.excess[at]
    for place, value in carried.largest_by_place(values).items():
        excess[place] = max(excess.get(place, 0.0), value)
    worse = np.flatnonzero(~(values <= 1.0))
    for address in carried.addresses(worse[np.unique(carried.place[worse], return_index=True)[1]]):
        first.setdefault(address.place, address)


def inputs_of(arithmetic: Arithmetic) -> str:
    """Return what the sites that are judged have in common, in words."""
    return "equal or nearly equal inputs" if arithmetic.is_configured else "equal inputs"


def fresh_rows(table: DriftTable, mode: str, arithmetic: Arithmetic) -> Rows:
    """Return the pairs of `mode` at the native dtype whose inputs have the same bits; none if it cannot judge."""
    rows = table.select(mode, arithmetic.dtype)
    if not arithmetic.can_judge:
        return rows.where(np.zeros(len(rows), dtype=bool))
    return rows.where(Walk(rows, table.lost(mode, arithmetic.dtype)).is_fresh())


def beyond_alone(rows: Rows, arithmetic: Arithmetic) -> Rows:
    """Return the pairs of `rows` that are beyond rounding each by itself, before they are pooled over units.

    `rows` are those of kv_aligned at the native dtype. A difference of NaN or infinity is beyond rounding.
    """
    beyond = np.zeros(len(rows), dtype=bool)
    if not arithmetic.can_judge:
        return rows.where(beyond)
    walk = Walk(rows)
    judged = _judge(walk, arithmetic)
    for site in {place.site for place in rows.places}:
        at = np.flatnonzero(rows.is_at(site) & judged.is_fresh & ~rows.equal)
        is_copy, passed = _stored(walk, at, site), _passed(walk, rows.where(at), arithmetic)
        beyond[at] = ~(_excess_alone(rows.where(at), site, arithmetic, is_copy, passed) <= 1.0)
    beyond |= judged.is_carried & ~rows.equal & ~(judged.excess <= 1.0)
    return rows.where(beyond)


def _passed(walk: Walk, rows: Rows, arithmetic: Arithmetic) -> Floats:
    """Return [pair of rows, all of one site] what rounding may do in attention and products between the site and what
    of its inputs was recorded."""
    site = rows.places[0].site if rows.places else None
    if arithmetic.is_configured or site not in PARENTS or site in CACHE_SITES:
        return np.zeros(len(rows))
    return walk.passed_through(walk.rows.find(rows.key), site, arithmetic)


def _detail(
    places: Iterable[Place], judged: _Judged, arithmetic: Arithmetic, passed: Mapping[Place, Floats]
) -> dict[str, Any]:
    """What must differ at least at the sites that were judged, by themselves, since attention may differ by more than
    the products that the stated minimum is of; and how many pairs were judged."""
    sites = {place.site for place in places}
    most = {site: max(float(passed[place].max()) for place in passed if place.site is site) for site in sites}
    bounds = {
        str(site): math.hypot(arithmetic.bound(site), most[site])
        for site in Site
        if site in sites and site not in CACHE_SITES
    }
    return {"minimum_by_site": bounds, "n_pairs": int(judged.is_fresh.sum() + judged.is_carried.sum())}


def _minimum(rows: Rows, judged: _Judged, arithmetic: Arithmetic, passed: Mapping[Place, Floats]) -> float:
    """The smallest relative difference that is beyond rounding wherever it is, of the sites that are judged here.

    What lies behind a fault, in the same layer, is bounded by what the fault did, and left out.
    """
    if not arithmetic.is_configured:
        through = (
            math.hypot(arithmetic.bound(place.site), float(of.max())) for place, of in passed.items() if of.any()
        )
        return max([PRODUCT_ROUNDINGS * arithmetic.unit, *through])
    fresh = {site: np.flatnonzero(rows.is_at(site) & judged.is_fresh) for site in {p.site for p in rows.places}}
    enters = judged.is_carried & ~(judged.excess <= 1.0)
    for site, at in fresh.items():
        enters[at] = ~(_excess_alone(rows.where(at), site, arithmetic, None) <= 1.0)
    layers, which = np.unique(layer_keys(rows.key), return_inverse=True)
    origin = np.full(len(layers), len(Site))  # the first site of each layer at which something enters
    np.minimum.at(origin, which[enters], rows.site[enters])
    counted = judged.is_carried & (rows.site <= origin[which])
    bounds = [arithmetic.bound(site) for site, at in fresh.items() if len(at)]
    return float(max([*bounds, *judged.bound[counted].tolist()], default=0.0))


def _counts(rows: Rows, repeated: Collection[Unit]) -> Bools:
    """Of which pairs the unit counts: those of a repeated one say nothing new."""
    if not repeated:
        return np.ones(len(rows), dtype=bool)
    return np.array([(a.prompt, a.position) not in repeated for a in rows.addresses()], dtype=bool)


def _is_copy(walk: Walk, place: Place, rows: Rows) -> bool:
    """Whether a place holds cached rows of all of which is known what was stored."""
    return place.site in CACHE_SITES and bool(_stored(walk, walk.rows.find(rows.key), place.site).all())


def _stored(walk: Walk, at: Index, site: Site) -> Bools:
    """Of which of the pairs `at`, all of `site`, it is known what was stored there."""
    if site not in CACHE_SITES:
        return np.zeros(len(at), dtype=bool)
    found = np.ones(len(at), dtype=bool)
    for parent in PARENTS[site]:
        found &= walk.is_recorded(at, parent)
    return found


def _excess(rows: Rows, arithmetic: Arithmetic, is_copy: bool, counted: Rows, passed: Floats) -> float:
    """The difference at one place, over all its fresh pairs, in units of what rounding can do.

    `is_copy` says that the place holds what was stored there, and that this had the same bits; `counted` are the rows
    of distinct units. `passed` [pair] is what rounding may do before the place, where that was not recorded: then a
    place differs by more than its own operation rounds.
    """
    site = rows.places[0].site
    if (rows.n_lost > 0).any() or np.isinf(rows.rel_l2).any():
        return math.inf
    # Only the row of the token itself may differ in a cache, and not even that if the key that was stored did not.
    if site in CACHE_SITES and rows.n_bad_past.any():
        return math.inf
    apart = float((rows.rel_l2 / np.hypot(arithmetic.bound(site, rows.dtype[0]), passed)).max())
    if arithmetic.is_configured or passed.any():
        return apart
    unit = arithmetic.unit
    if site in CACHE_SITES:
        return max(apart, _flips(counted, unit) if is_copy else 0.0)
    if site in ROW_WISE:
        # Flipped roundings, however few, leave a row within one rounding of itself.
        return apart if apart > 1.0 else min(_flips(counted, unit), max(apart, _common_factor(counted, unit)))
    gain = _gain(counted) if _is_product(site) else None
    return apart if gain is None else max(apart, _beyond_truncation(gain, unit))


def _excess_alone(
    rows: Rows, site: Site, arithmetic: Arithmetic, is_copy: Bools | None, passed: Floats | float = 0.0
) -> Floats:
    """The same for each pair of `site` by itself, which has no factor in common with another; None: no copies."""
    bounds = {dtype: arithmetic.bound(site, dtype) for dtype in set(rows.dtype)}
    excess = rows.rel_l2 / np.hypot(np.array([bounds[dtype] for dtype in rows.dtype]), passed)
    if not arithmetic.is_configured and site in CACHE_SITES:
        flips = _flips_alone(rows, arithmetic.unit) * (0.0 if is_copy is None else is_copy)
        excess = np.maximum(excess, flips)
    elif not arithmetic.is_configured and site in ROW_WISE:
        flipped = np.where(excess > 1.0, excess, np.minimum(_flips_alone(rows, arithmetic.unit), excess))
        excess = np.where(np.asarray(passed) > 0.0, excess, flipped)
    is_gross = (rows.n_lost > 0) | np.isinf(rows.rel_l2)
    if site in CACHE_SITES:
        is_gross |= rows.n_bad_past > 0
    return np.where(is_gross, math.inf, excess)


def _first(rows: Rows, arithmetic: Arithmetic, is_copy: bool, passed: Floats) -> Address:
    """The first pair that is beyond rounding by itself; where only their number is, the first that differs."""
    copies = np.full(len(rows), is_copy)
    alone = _excess_alone(rows, rows.places[0].site, arithmetic, copies, passed) > 1.0
    return rows.addresses(np.flatnonzero(alone if alone.any() else ~rows.equal)[:1])[0]


def _flips(rows: Rows, unit: float) -> float:
    return float(_over_poisson(rows.n_differ.sum(), rows.n_elements.sum(), unit))


def _flips_alone(rows: Rows, unit: float) -> Floats:
    return _over_poisson(rows.n_differ, rows.n_elements, unit)


def _over_poisson(flipped: Floats | Ints, n_elements: Floats | Ints, unit: float) -> Floats:
    """Flipped elements over as many as chance may flip."""
    expected = ROW_WISE_ROUNDINGS * UNIT_ROUNDOFF["float32"] / unit * n_elements
    # Six standard deviations of a Poisson count, and three for the smallest counts: p below 1e-8.
    return np.asarray(flipped / (expected + 6.0 * np.sqrt(expected) + 3.0))


def _common_factor(rows: Rows, unit: float) -> float:
    """How clearly the rows are all off by a factor of the same sign: rounding leaves the factor's sign to chance."""
    gains = rows.gain
    if len(gains) < 2 or not np.isfinite(gains).all() or abs(float(gains.mean())) < unit * _LEAST_FACTOR:
        return 0.0
    error = float(gains.std(ddof=1)) / math.sqrt(len(gains))
    if error == 0.0:
        return math.inf
    t = abs(float(gains.mean())) / error
    return t / _FACTOR_DEVIATIONS if chance_of_t(t, len(gains) - 1) <= _FACTOR_CHANCE else 0.0


def _is_product(site: Site) -> bool:
    """Whether a site is a product with a weight matrix, whose rows carry no freedom such as the shift of scores."""
    return site not in ROW_WISE | CACHE_SITES | ATTENTION_ROW_SITES | STATE_SITES | {Site.ATTN_CTX}


def _gain(rows: Rows) -> Gain | None:
    """The common factor of the rows of a place; None for a single unit, whose spread is not known."""
    gains = rows.gain
    if len(gains) < 2 or not np.isfinite(gains).all():
        return None
    mean, error = float(gains.mean()), float(gains.std(ddof=1)) / math.sqrt(len(gains))
    pairs = list(zip(rows.rel_l2.tolist(), gains.tolist(), strict=True))
    squared = float(sum(drift**2 for drift, _ in pairs))
    explained = (
        0.0
        if squared == 0.0
        else 1.0 - float(sum(drift**2 - (2.0 * gain - mean) * mean for drift, gain in pairs)) / squared
    )
    return Gain(mean, error, explained)


def _beyond_truncation(gain: Gain, unit: float) -> float:
    """How far a factor is, with near certainty, beyond what truncation in one of two kernels does."""
    return max(0.0, abs(gain.mean) - _GAIN_DEVIATIONS * gain.error) / (_TRUNCATED * unit)


def _abstain(mode: str, reason: str) -> Evidence:
    return Evidence.abstain(
        "native", mode, "largest difference at a site with equal inputs over what rounding can do there", reason
    )


class Native(Blind):
    """Judges the sites with equal inputs of kv_aligned."""

    name: ClassVar[str] = "native"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge them at the native dtype; nothing is known of the inputs of as_designed and of foreign traces."""
        if mode != Mode.KV_ALIGNED or run.foreign is not None:
            return NOTHING
        exact = panel.seen("products", mode).found
        cancelling, places = (
            (exact.cancelling, exact.places) if isinstance(exact, Exact) else (frozenset(), frozenset())
        )
        of_8_bits = panel.seen("replay", mode).found
        left_out = {*cancelling, *(of_8_bits.addresses if isinstance(of_8_bits, Replayed) else ())}
        found = judge_native(run.table, mode, run.info.arithmetic, run.repeated_units, left_out)
        alone = beyond_alone(run.table.select(mode, run.info.dtype), run.info.arithmetic)
        causes = tuple(_scaled(found))
        return Seen(
            evidence=(_to_the_end(found, run, mode, places),),
            begins=(*found.first.values(), *(cause.address for cause in causes)),
            beyond=tuple(address for address in alone.addresses() if address.place in found.first),
            causes=causes,
            n_pairs=int(str(found.evidence.detail.get("n_pairs", 0))),
        )


def _to_the_end(found: NativeFindings, run: Run, mode: str, exact: Collection[Place]) -> Evidence:
    """The evidence, which is not valid without a ladder if nothing in a layer behind its attention was judged: neither
    its output nor its feed-forward part, here or by an exact product of `exact`."""
    evidence = found.evidence
    if run.plan.ladder != "off" or run.info.arithmetic.is_configured or not evidence.valid or found.first:
        return evidence
    places = run.table.select(mode, run.info.dtype).places
    layers = {place.layer for place in places if place.layer is not None and place.site not in _BOUNDARIES}
    ends = {place.layer for place in (*found.excess, *exact) if place.site in (Site.MLP_OUT, Site.LAYER_OUT)}
    missing = sorted(layers - ends)
    if not missing:
        return evidence
    reason = f"nothing is known of {len(missing)} of {len(layers)} layers behind their attention (first: {missing[0]})"
    return replace(evidence, valid=False, supports=None, reason=reason)


def _scaled(fresh: NativeFindings) -> Iterator[Directed]:
    """The products that are off by a factor, as causes."""
    for place, gain in fresh.gains.items():
        cause = FACTOR_OF.get(place.site, Cause.SCALED)
        interval = (gain.mean - 2.0 * gain.error, gain.mean + 2.0 * gain.error)
        yield Directed(cause, place.layer, gain.mean, interval, None, fresh.first[place], gain.explained)
