"""What rounding can do in recorded traces that have no precision ladder, and that may lack sites.

A site may differ by its own rounding and by what its inputs differ by, times the most that an operation amplifies. A
site that was not recorded is passed through to what it is computed from in turn, and its rounding is added in
quadrature: roundings of different operations are independent. Nothing is presumed across a layer of which nothing was
recorded. Where such a bound is so wide that a fault fits into it, as it is at half precision wherever the inputs
differ, it is not used.

Rows of the cache that were not recorded are as equal as what they were written from: they drift by at most
`_WRITTEN_MARGIN` times the largest drift that any token showed there, which is nothing if none showed any.

Where the arithmetic of the engine is not known, the bounds are those of the coarsest dtype that the values' own bits
allow. A rotation keeps lengths, and is bounded by the drift of what it rotates. Other sites without a bound are
covered by the traces' own self-noise (a second prefill of the same token), or by replay, or by nothing, which is said.

A verdict that was asked for on samples at one rung covers them by the growth of decision 15 as well; what fits into
that is stated as its minimum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Blind, Judges, Panel, Run, Seen
from kvdrift.instruments.directed import Replay
from kvdrift.instruments.recorded_evidence import (
    SELF_NOISE_MARGIN,
    Terms,
    carried_evidence,
    fresh_evidence,
    noise_evidence,
    promise_evidence,
    ratios_of,
)
from kvdrift.instruments.walk import GROWTH, Index, Walk
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Bools, Floats, Ints, Rows, beside, elsewhere, keys_at
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, Mode
from kvdrift.vocabulary.sites import CACHE_SITES, PARENTS, ROW_WISE, Site

# Cached rows of layer 0 are made of the same token ids, by operations that are passed through.
_MADE_ALIKE = 2.0
_ABOVE_BOUND = 16.0
# No operation of a decoder makes a relative difference of its input this many times larger: a softmax of large scores,
# a sum that cancels and a norm with outlying weights come to some hundred.
_AMPLIFICATION = 1000.0
# A bound above this would allow a fault as well, so that it bounds nothing.
_LARGEST_BOUND = 0.2
# Rows of other tokens may drift this many times more than those of the tokens that were compared.
_WRITTEN_MARGIN = 16.0
# A norm of queries or keys that was not recorded may stand between a projection and its rotation.
_ROTATION_MARGIN = 8.0

# The most that drifting inputs may come to where their growth (decision 15) covers a site.
_LARGEST_CARRIED = 1.0

_ATTENTION = (Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX)


@dataclass(frozen=True, slots=True)
class RecordedFindings:
    """`beyond` are the addresses beyond their bound; `uncovered` places that differ where nothing bounds the
    rounding, and `uncarried` those of them that differ more than their inputs explain, or with unknown inputs."""

    uncovered: tuple[Place, ...]
    n_places: int
    evidence: tuple[Evidence, ...]
    beyond: tuple[Address, ...] = ()
    n_within: int = 0
    uncarried: tuple[Place, ...] = ()


@dataclass(frozen=True)
class _Bounds:
    """What rounding may do to pairs of one mode and rung."""

    walk: Walk
    terms: Terms

    @property
    def rows(self) -> Rows:
        """The pairs."""
        return self.walk.rows

    def allowed(self) -> Floats:
        """The relative drift that rounding may cause at each pair; NaN if its inputs differ or are not known."""
        return self._of_all[0]

    def carried(self) -> Floats:
        """The relative drift that is rounding if no operation amplifies the drift of its inputs more than `GROWTH`
        times, [pair]; NaN where that is unknown, or so much that anything would fit into it."""
        carried = self._of_all[1]
        return np.where(carried <= _LARGEST_CARRIED, carried, math.nan)

    def is_unknown(self) -> Bools:
        """Whether nothing is known of how far the inputs of each pair drift."""
        return np.asarray(np.isnan(self._of_all[1]))

    @cached_property
    def _of_all(self) -> tuple[Floats, Floats]:
        allowed, carried = np.full((2, len(self.rows)), math.nan)
        for place, at in self.rows.by_places.items():
            allowed[at], carried[at] = self._of(at, place)
        return allowed, carried

    def _of(self, at: Index, place: Place) -> tuple[Floats, Floats]:
        """What rounding may do to pairs of one place, and what it may with inputs that drift."""
        if place.site in CACHE_SITES and self.terms.mode != Mode.KV_ALIGNED:
            written = np.full(len(at), self._written(place))
            return written, written
        passed = np.zeros(len(at))
        total, is_known, is_drifting = np.zeros(len(at)), np.ones(len(at), dtype=bool), np.zeros(len(at), dtype=bool)
        largest = np.zeros(len(at))
        for parent in self.parents(place):
            drift = self._drift(at, place, parent, passed)
            is_known &= ~np.isnan(drift)
            is_drifting |= drift > 0.0
            total += drift
            largest = np.fmax(largest, drift / _WRITTEN_MARGIN if self._is_unseen(parent) else drift)
        own = np.sqrt(self.bound(place.site) ** 2 + passed)
        allowed = own + _AMPLIFICATION * total
        is_wide = ~(allowed <= _LARGEST_BOUND) & is_drifting
        allowed = np.where(is_wide, self._rotated(at, place), allowed)
        if place.site is Site.LAYER_IN:
            allowed = np.where((passed == 0.0) & ~is_drifting, 0.0, allowed)  # it is what the layer below handed over
        allowed = np.where(is_known, allowed, math.nan)
        if place.site is Site.FINAL_NORM_OUT and not self.terms.n_layers:
            # Which layer is the last is not known; the highest that was recorded is the best guess there is.
            carried = own + GROWTH * self._drift(at, place, Place(self._highest, Site.LAYER_OUT), passed)
        else:
            carried = np.where(is_known, own + GROWTH * largest, math.nan)
        if place.site in CACHE_SITES:
            # Rows that decode did not write are prefill's own, unless the step was taken on others.
            made = self._written(place) if self.breaks_promise(place.site) else math.nan
            spoilt = 0.0 if math.isnan(made) else made
            allowed = np.where(self.rows.n_bad_past[at] > 0, spoilt, allowed)
        return allowed, carried

    def breaks_promise(self, site: Site) -> bool:
        """Whether the steps of kv_aligned were not taken on the rows that prefill wrote: most of their reads of `site`
        differ in rows of earlier tokens. A fault of the cache spoils some rows, and not a little of all."""
        reads = self.rows.is_at(site)
        return self.terms.mode == Mode.KV_ALIGNED and 2 * int((self.rows.n_bad_past[reads] > 0).sum()) > int(
            reads.sum()
        )

    def _is_unseen(self, place: Place) -> bool:
        """Whether a place is rows of the cache that decode wrote and that were not recorded."""
        is_written = place.site in CACHE_SITES and self.terms.mode != Mode.KV_ALIGNED
        return is_written and place not in self.rows.places

    @property
    def _highest(self) -> int:
        return max((place.layer for place in self.rows.places if place.layer is not None), default=0)

    def _written(self, place: Place) -> float:
        """The bound of cached rows where decode wrote some of them itself: how far new keys and values drift there; NaN
        if that is not known."""
        if place.layer == 0:  # made of the same token ids
            return _MADE_ALIKE * (self.bound(Site.K_PROJ) + 3.0 * self.bound(Site.ATTN_NORM_OUT))
        sources = (Site.K_ROPE, Site.K_PROJ) if place.site is Site.K_CACHE else (Site.V_PROJ,)
        for source in sources:
            if (found := Place(place.layer, source)) in self.rows.places:
                drift = float(self.rows.rel_l2[self.rows.place == self.rows.places.index(found)].max())
                allowed = _WRITTEN_MARGIN * drift + self.bound(place.site)
                return allowed if allowed <= _LARGEST_BOUND else math.nan
        return math.nan

    def _rotated(self, at: Index, place: Place) -> Floats:
        """The bound of a rotation: it keeps lengths, so that what differed before it differs by as much after it."""
        allowed, is_found = np.full(len(at), math.nan), np.zeros(len(at), dtype=bool)
        rotations = {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}
        for source in rotations.get(place.site, ()):
            found = self.rows.find(elsewhere(self.rows.key[at], place.layer, source))
            before = self.rows.rel_l2[found]
            bound = np.where(before < 1.0, _ROTATION_MARGIN * before + self.bound(place.site), math.nan)
            allowed = np.where((found >= 0) & ~is_found, bound, allowed)
            is_found |= found >= 0
        return allowed

    def parents(self, place: Place) -> list[Place]:
        """What a place is computed from; itself, if that is not known."""
        layer, site = place
        if site is Site.EMBED_OUT:
            return []
        if site is Site.LAYER_IN:
            if layer is None:
                return [place]
            return [Place(None, Site.EMBED_OUT)] if layer == 0 else [Place(layer - 1, Site.LAYER_OUT)]
        if site is Site.FINAL_NORM_OUT:
            return [Place(self.terms.n_layers - 1 if self.terms.n_layers else None, Site.LAYER_OUT)]
        if site is Site.LOGITS:
            return [Place(None, Site.FINAL_NORM_OUT)]
        if site not in PARENTS:
            return [place]  # a recurrent state: nothing is known of what it was computed from
        return [Place(layer, parent) for parent in PARENTS[site]]

    def _drift(self, at: Index, own: Place, place: Place, passed: Floats) -> Floats:
        """How far the input `place` of the pairs `at` of the place `own` drifts, through what was not recorded of it;
        NaN if that is not known. What is passed through is added to `passed`."""
        return _Drift(self, own, passed).of(self.walk, at, place)

    def bound(self, site: Site) -> float:
        """By how much two right ways to compute a site differ, relatively."""
        kind = "row" if site in ROW_WISE or site in (Site.EMBED_OUT, Site.LAYER_IN) else "product"
        kind = "attention" if site in (Site.ATTN_PROBS, Site.ATTN_CTX) else kind
        return self.terms.roundings[kind] * self.terms.arithmetic.unit

    def bound_of_passing(self, site: Site) -> float:
        """The same for a site that was not recorded; what is stored or handed over is a copy, and most models lack
        some sites."""
        is_copy = site in CACHE_SITES or site in (Site.Q_NORM, Site.K_NORM, Site.ROUTER, Site.LAYER_IN)
        return 0.0 if is_copy else self.bound(site)

    def unseen_rows(self, place: Place, passed: Floats) -> float:
        """How far rows of the cache that were not recorded may drift at most: as far as anything that they are written
        from did, at any token, times `_WRITTEN_MARGIN`; NaN if nothing is known of it. The squares of what is passed
        through are added to `passed`."""
        known = self.rows.by_places
        while place not in known:
            site = place.site
            passed += self.bound_of_passing(site) ** 2
            sources = self.parents(place)
            if len(sources) != 1 or sources[0] == place or site in (Site.LAYER_OUT, Site.EMBED_OUT):
                return 0.0 if site is Site.EMBED_OUT else math.nan
            place = sources[0]
        here = known[place]
        drift = np.where(self.rows.equal[here], 0.0, self.rows.rel_l2[here])
        return float(_WRITTEN_MARGIN * drift.max()) if np.isfinite(drift).all() else math.nan


@dataclass(frozen=True, slots=True)
class _Drift:
    """How far the inputs of the place `own` drift. Squared bounds of what is passed through are added to `passed`
    [pair]."""

    unknown: ClassVar[float | bool] = math.nan
    bounds: _Bounds
    own: Place
    passed: Floats

    def of(self, walk: Walk, at: Index, where: Place) -> Floats:
        """Return it for `where`, seen from each of `at`; of a place that is its own input nothing is known."""
        return np.full(len(at), math.nan) if where == self.own else walk.follow(at, where, self)

    def keys(self, keys: Ints, where: Place) -> Ints:
        """Return the keys of a place at the same prompts and positions."""
        return elsewhere(keys, *where)

    def recorded(self, rows: Rows, found: Index, where: Place) -> Floats:
        """Return how far it drifts, NaN if that is not finite."""
        drift = rows.rel_l2[found]
        return np.where(rows.equal[found], 0.0, np.where(np.isfinite(drift), drift, math.nan))

    def absent(self, walk: Walk, at: Index, index: Index, where: Place) -> Floats:
        """Pass through to what `where` is computed from; nothing is presumed across a layer."""
        if where.site is Site.LAYER_OUT:
            return np.full(len(at), math.nan)
        more = self.passed[index]
        if where.site in CACHE_SITES and where.layer != 0 and self.bounds.terms.mode != Mode.KV_ALIGNED:
            drift = self.bounds.unseen_rows(where, more)
            self.passed[index] = more
            return np.full(len(at), drift)
        more += self.bounds.bound_of_passing(where.site) ** 2
        behind = replace(self, passed=more)
        drifts = [behind.of(walk, at, parent) for parent in self.bounds.parents(where)]
        self.passed[index] = more
        return np.asarray(np.maximum.reduce(drifts)) if drifts else np.zeros(len(at))


def judge_recorded(table: DriftTable, terms: Terms, replayed: Iterable[tuple[str, int, int]]) -> RecordedFindings:
    """Judge the recorded rows of one mode; a drift of NaN or infinity is beyond every bound.

    `replayed` are the (prompt, position, layer) whose attention was replayed within its bound.
    """
    rows = table.select(terms.mode, terms.rung)
    bounds = _Bounds(Walk(rows, table.lost(terms.mode, terms.rung)), terms)
    allowed, carried = bounds.allowed(), bounds.carried()
    noise = _self_noise(table, terms.rung)
    allowed = np.where(np.isnan(allowed) & bounds.is_unknown(), _without_noise(rows, terms, noise), allowed)
    has_bound = ~np.isnan(allowed)
    excess = ratios_of(rows, allowed)
    is_open = ~rows.equal & ~has_bound & ~_is_replayed(rows, replayed)
    floor = np.nan_to_num(rows.by_place(noise))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.where(floor > 0.0, rows.rel_l2 / (SELF_NOISE_MARGIN * floor), math.inf)
    is_uncovered = is_open & ~(ratio <= 1.0)
    is_uncarried = is_uncovered & ~(ratios_of(rows, carried) <= 1.0)
    beyond = np.flatnonzero(has_bound & ~(excess <= 1.0))
    beyond = beyond[np.lexsort((rows.position[beyond], rows.rank[beyond]))]
    n_judged = len(np.unique(rows.place[has_bound]))
    evidence = [fresh_evidence(terms, rows, excess[has_bound], beyond, n_judged)]
    if noise:
        evidence.append(noise_evidence(terms, float(ratio[is_open].max(initial=0.0)), noise))
    if any(bounds.breaks_promise(site) for site in CACHE_SITES):
        evidence.append(promise_evidence(terms, rows))
    if terms.covers_carried and is_uncovered.any():
        evidence.append(carried_evidence(terms, rows, carried, is_uncovered))
    return RecordedFindings(
        _places(rows, is_uncovered),
        len(rows.places),
        tuple(evidence),
        tuple(rows.addresses(beyond)),
        len(rows) - int((is_uncarried if terms.covers_carried else is_uncovered).sum()) - len(beyond),
        _places(rows, is_uncarried),
    )


def _without_noise(rows: Rows, terms: Terms, noise: Mapping[Place, float]) -> Floats:
    """The bound of pairs that have no other, at full precision, where two prefills of one token agree to the bit: an
    engine that repeats itself does not round by as much as a fifth of a value. NaN elsewhere."""
    if terms.arithmetic.can_judge:
        return np.full(len(rows), math.nan)
    silent = {place: 1.0 for place, drift in noise.items() if drift == 0.0}
    return np.where(rows.by_place(silent) == 1.0, _LARGEST_BOUND, math.nan)


def _places(rows: Rows, chosen: Bools) -> tuple[Place, ...]:
    """The places of the chosen pairs in forward order."""
    return tuple(sorted({rows.places[code] for code in np.unique(rows.place[chosen])}, key=_rank))


def _rank(place: Place) -> tuple[int, int]:
    return place.forward_rank


def _is_replayed(rows: Rows, replayed: Iterable[tuple[str, int, int]]) -> Bools:
    """Whether each pair is one of an attention that was replayed within its bound."""
    known = [Address(*place, Site.ATTN_CTX) for place in replayed if place[0] in rows.prompts]
    context = keys_at(known, rows.prompts)
    is_attention = rows.is_at(*_ATTENTION)
    return is_attention & np.isin(beside(rows.key, Site.ATTN_CTX), context)


def plantable(table: DriftTable, terms: Terms, prompt: str) -> tuple[Address, float] | None:
    """Return an address of `prompt` at which a planted fault must be seen, and its relative size; None if none is."""
    rows = table.select(terms.mode, terms.rung)
    allowed = _Bounds(Walk(rows, table.lost(terms.mode, terms.rung)), terms).allowed()
    at = np.flatnonzero(
        rows.of_prompt(prompt) & ~rows.is_outside & ~rows.is_at(*CACHE_SITES) & (rows.rel_l2 <= allowed)
    )
    wanted = [Site.Q_ROPE, Site.ATTN_CTX, Site.ATTN_OUT]
    for sites in (*((site,) for site in wanted), tuple(set(Site) - {*wanted})):
        here = at[np.isin(at, np.flatnonzero(rows.is_at(*sites)))]
        if len(here):
            best = here[np.lexsort((rows.position[here], rows.rank[here]))[:1]]
            size = 2.0 ** math.ceil(math.log2(_ABOVE_BOUND * max(float(allowed[best[0]]), terms.arithmetic.unit)))
            return rows.addresses(best)[0], size
    return None


def judge_planted(table: DriftTable, terms: Terms, place: Place | None, size: float | None) -> Evidence:
    """Say whether the fault that was planted into the recorded values was found at its own address."""
    name = "drift of the planted fault over its rounding bound"
    if place is None or size is None:
        reason = (
            "no fault could be planted, since no site of a layer has known inputs; record embed_out or the layer "
            "inputs, and the sites that are computed from them"
        )
        return Evidence.abstain("positive_control", None, name, reason)
    rows = table.select(CONTROL, terms.rung)
    allowed = _Bounds(Walk(rows), terms).allowed()
    excess = ratios_of(rows, allowed)
    beyond = np.flatnonzero(~np.isnan(allowed) & ~(excess <= 1.0))
    beyond = beyond[np.lexsort((rows.position[beyond], rows.rank[beyond]))][:1]
    layer, site = place
    first = next(iter(rows.addresses(beyond)), None)
    seen = first is not None and first.place == place
    where = "nowhere" if first is None else f"at {first.place}"
    text = (
        f"{site} of layer {layer} scaled by 1 + {size:.1e} in the recorded decode step was found at its own address"
        if seen
        else f"a fault of {size:.1e} planted at layer {layer} / {site} was found {where}"
    )
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name=name,
        statistic=None if first is None else float(excess[beyond[0]]),
        bound=1.0,
        valid=seen,
        reason=None if seen else text,
        minimum_detectable=size,
        text=text,
        detail={"layer": layer, "site": str(site), "relative_size": size, "planted_in": "values"},
    )


def _self_noise(table: DriftTable, rung: str) -> dict[Place, float]:
    rows = table.select(SELF_NOISE, rung)
    rows = rows.where(np.isfinite(rows.rel_l2))
    return rows.largest_by_place(rows.rel_l2)


class Recorded(Blind):
    """Judges traces that were recorded elsewhere by what they themselves bound; `Seen.found` is `RecordedFindings`."""

    name: ClassVar[str] = "recorded"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the recorded rows; attention that replay found within its bound is covered by it."""
        if run.foreign is None:
            return NOTHING
        seen = panel.seen(Replay.name, mode)
        beyond = {address[:3] for address in seen.begins}
        units = seen.found if isinstance(seen.found, frozenset) else ()
        found = judge_recorded(run.table, terms_of(run, mode), {unit for unit in units if unit not in beyond})
        return Seen(evidence=found.evidence, begins=found.beyond, beyond=found.beyond, found=found)


def terms_of(run: Run, mode: str) -> Terms:
    """Return how foreign values of `mode` are judged."""
    assert run.foreign is not None
    foreign = run.foreign
    return Terms(
        mode,
        run.info.dtype,
        foreign.arithmetic,
        foreign.computed_in is None,
        foreign.n_layers,
        run.scope.sampled,
    )
