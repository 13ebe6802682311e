"""What rounding can do in recorded traces that have no precision ladder, and that may lack sites.

A site may differ by its own rounding and by what its inputs differ by, times the most that an operation amplifies. A
site that was not recorded is passed through to what it is computed from in turn, which widens the bound by the bounds
of what was passed through. Nothing is presumed across a layer of which nothing was recorded. Where such a bound is so
wide that a fault fits into it, as it is at half precision wherever the inputs differ, it is none.

Where the arithmetic of the engine is not known, the bounds are those of bfloat16, the coarsest in use, four times over:
a difference beyond them is no rounding of any engine. A rotation keeps lengths, and is bounded by the drift of what it
rotates. Other sites without a bound are covered by the traces' own self-noise (a second prefill of the same token), or
by replay, or by nothing, which is said.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from kvdrift.compare.drift import NO_LAYER, DriftRow, DriftTable
from kvdrift.instruments.ladder import Key, rank_of
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, Mode
from kvdrift.vocabulary.precision import HALF, UNIT_ROUNDOFF
from kvdrift.vocabulary.sites import CACHE_SITES, PARENTS, ROW_WISE, Site

Place = tuple[int, str]  # layer, site

# Roundings by which two right ways to compute a site may differ, in units of the roundoff: half precision accumulates
# in float32 and rounds once or a few times; at full precision a sum of n terms loses lambda * sqrt(n) roundings
# (Higham & Mary 2019, theorem 3.1), here with lambda = 8 and n = 2^16.
_HALF = {"row": 2.0, "product": 4.0, "attention": 16.0}
_FULL = {"row": 64.0, "product": 2048.0, "attention": 2048.0}
_UNKNOWN_SLACK = 4.0
# What is passed through is amplified by what follows it.
_PASSED_THROUGH = 2.0
# Decode may drift more than two prefills of one token do: other kernels, fewer rows.
_SELF_NOISE_MARGIN = 8.0
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

_ATTENTION = (Site.ATTN_SCORES, Site.ATTN_PROBS, Site.ATTN_CTX)


@dataclass(frozen=True, slots=True)
class Terms:
    """How to judge: the mode, the rung of the values, the engine's arithmetic (None: unknown) and its last layer."""

    mode: str
    rung: str
    arithmetic: str | None
    n_layers: int

    @property
    def unit(self) -> float:
        return UNIT_ROUNDOFF[self.dtype]

    @property
    def dtype(self) -> str:
        """The dtype whose roundings are allowed: the coarsest where it is not known."""
        return self.arithmetic or "bfloat16"


@dataclass(frozen=True, slots=True)
class RecordedFindings:
    """`excess` of every address that has a bound; `uncovered` places that differ where nothing bounds the rounding."""

    excess: dict[Key, float]
    uncovered: tuple[Place, ...]
    n_places: int
    evidence: tuple[Evidence, ...]
    beyond: tuple[Key, ...] = ()
    n_within: int = 0


@dataclass(slots=True)
class _Walk:
    """The rows of one pass pair set, and which addresses were there and could not be compared."""

    rows: dict[Key, DriftRow]
    lost: set[Key]
    terms: Terms
    passed: float = field(default=0.0)

    def allowed(self, row: DriftRow) -> float | None:
        """The relative drift that rounding may cause at this row; None if its inputs differ or are not known."""
        self.passed = 0.0
        site, layer = Site(row.site), row.layer
        if site in CACHE_SITES and self.terms.mode != Mode.KV_ALIGNED:
            return self._written(site, layer)
        if site in CACHE_SITES and row.n_bad_past:
            return 0.0
        drifts = [self._drift(row, parent, at) for parent, at in self._parents(site, layer)]
        known = [drift for drift in drifts if drift is not None]
        if len(known) < len(drifts):
            return None
        if site is Site.LAYER_IN and not self.passed and not any(known):
            return 0.0  # it is what the layer below handed over
        allowed = self._bound(site) + self.passed + _AMPLIFICATION * sum(known)
        return allowed if allowed <= _LARGEST_BOUND or not any(known) else self._rotated(row, site)

    def _written(self, site: Site, layer: int) -> float | None:
        """The bound of cached rows where decode wrote some of them itself: how far new keys and values drift there."""
        if layer == 0:  # made of the same token ids
            return _PASSED_THROUGH * (self._bound(Site.K_PROJ) + 3.0 * self._bound(Site.ATTN_NORM_OUT))
        sources = (Site.K_ROPE, Site.K_PROJ) if site is Site.K_CACHE else (Site.V_PROJ,)
        for source in sources:
            drifts = [row.rel_l2 for row in self.rows.values() if (row.layer, row.site) == (layer, source)]
            if drifts:
                allowed = _WRITTEN_MARGIN * max(drifts) + self._bound(site)
                return allowed if allowed <= _LARGEST_BOUND else None
        return None

    def _rotated(self, row: DriftRow, site: Site) -> float | None:
        """The bound of a rotation: it keeps lengths, so that what differed before it differs by as much after it."""
        for source in {Site.Q_ROPE: (Site.Q_NORM, Site.Q_PROJ), Site.K_ROPE: (Site.K_NORM, Site.K_PROJ)}.get(site, ()):
            before = self.rows.get((row.prompt, row.position, row.layer, str(source)))
            if before is not None:
                is_known = math.isfinite(before.rel_l2) and before.rel_l2 < 1.0
                return _ROTATION_MARGIN * before.rel_l2 + self._bound(site) if is_known else None
        return None

    def _parents(self, site: Site, layer: int) -> list[tuple[Site, int]]:
        if site is Site.EMBED_OUT:
            return []
        if site is Site.LAYER_IN:
            return [(Site.EMBED_OUT, NO_LAYER)] if layer == 0 else [(Site.LAYER_OUT, layer - 1)]
        if site is Site.FINAL_NORM_OUT:
            return [(Site.LAYER_OUT, self.terms.n_layers - 1)]
        if site is Site.LOGITS:
            return [(Site.FINAL_NORM_OUT, NO_LAYER)]
        if site not in PARENTS:
            return [(site, layer)]  # a recurrent state: nothing is known of what it was computed from
        return [(parent, layer) for parent in PARENTS[site]]

    def _drift(self, row: DriftRow, site: Site, layer: int) -> float | None:
        """How far the input `site` drifts, through what was not recorded of it; None if that is not known."""
        key = (row.prompt, row.position, layer, str(site))
        if key in self.lost or (site, layer) == (Site(row.site), row.layer):
            return None
        found = self.rows.get(key)
        if found is not None:
            return 0.0 if found.equal else (found.rel_l2 if math.isfinite(found.rel_l2) else None)
        if site is Site.LAYER_OUT or (site in CACHE_SITES and layer != 0 and self.terms.mode != Mode.KV_ALIGNED):
            return None
        if site not in (Site.Q_NORM, Site.K_NORM, Site.ROUTER):  # those that most models lack
            self.passed += _PASSED_THROUGH * self._bound(site)
        drifts = [self._drift(row, parent, at) for parent, at in self._parents(site, layer)]
        known = [drift for drift in drifts if drift is not None]
        return None if len(known) < len(drifts) else max(known, default=0.0)

    def _bound(self, site: Site) -> float:
        dtype = self.terms.dtype
        roundings = _HALF if dtype in HALF else _FULL
        kind = "row" if site in ROW_WISE or site in (Site.EMBED_OUT, Site.LAYER_IN) else "product"
        kind = "attention" if site in (Site.ATTN_PROBS, Site.ATTN_CTX) else kind
        slack = 1.0 if self.terms.arithmetic is not None else _UNKNOWN_SLACK
        return slack * roundings[kind] * UNIT_ROUNDOFF[dtype]


def judge_recorded(table: DriftTable, terms: Terms, replayed: Iterable[tuple[str, int, int]]) -> RecordedFindings:
    """Judge the recorded rows of one mode; `replayed` are the (prompt, position, layer) whose attention was replayed
    within its bound."""
    rows = table.select(terms.mode, terms.rung)
    walk = _Walk(rows, _lost(table, terms), terms)
    allowed = {key: walk.allowed(row) for key, row in rows.items()}
    excess = {key: _ratio(rows[key], bound) for key, bound in allowed.items() if bound is not None}
    noise = _self_noise(table, terms.rung)
    seen = set(replayed)
    worst_noise, n_within = 0.0, len(rows)
    uncovered: dict[Place, None] = {}
    for key, row in sorted(rows.items(), key=lambda item: _rank(item[0])):
        if (
            row.equal
            or key in excess
            or (Site(row.site) in _ATTENTION and (row.prompt, row.position, row.layer) in seen)
        ):
            continue
        floor = noise.get((row.layer, row.site), 0.0)
        ratio = row.rel_l2 / (_SELF_NOISE_MARGIN * floor) if floor > 0.0 else math.inf
        worst_noise = max(worst_noise, ratio)
        if not ratio <= 1.0:
            n_within -= 1
            uncovered.setdefault((row.layer, row.site))
    beyond = tuple(sorted((key for key, value in excess.items() if not value <= 1.0), key=_rank))
    n_within -= len(beyond)
    places = {(row.layer, row.site) for row in rows.values()}
    judged = {key[2:] for key in excess}
    evidence = [_fresh_evidence(terms, excess, beyond, len(judged), len(places))]
    if noise:
        evidence.append(_noise_evidence(terms, worst_noise, noise))
    return RecordedFindings(excess, tuple(uncovered), len(places), tuple(evidence), beyond, n_within)


def plantable(table: DriftTable, terms: Terms, prompt: str) -> tuple[Key, float] | None:
    """Return an address of `prompt` at which a planted fault must be seen, and its relative size; None if none is."""
    rows = table.select(terms.mode, terms.rung)
    walk = _Walk(rows, _lost(table, terms), terms)
    found: list[tuple[int, Key, float]] = []
    for key, row in rows.items():
        if row.prompt != prompt or row.layer == NO_LAYER or Site(row.site) in CACHE_SITES or not row.rel_l2 < math.inf:
            continue
        bound = walk.allowed(row)
        if bound is not None and row.rel_l2 <= bound:
            wanted = [Site.Q_ROPE, Site.ATTN_CTX, Site.ATTN_OUT]
            site = Site(row.site)
            size = 2.0 ** math.ceil(math.log2(_ABOVE_BOUND * max(bound, terms.unit)))
            found.append((wanted.index(site) if site in wanted else len(wanted), key, size))
    if not found:
        return None
    _, key, size = min(found, key=lambda item: (item[0], _rank(item[1])))
    return key, size


def judge_planted(table: DriftTable, terms: Terms, place: tuple[int, Site] | None, size: float | None) -> Evidence:
    """Say whether the fault that was planted into the recorded values was found at its own address."""
    name = "drift of the planted fault over its rounding bound"
    if place is None or size is None:
        reason = (
            "no fault could be planted, since no site of a layer has known inputs; record embed_out or the layer "
            "inputs, and the sites that are computed from them"
        )
        return Evidence(
            instrument="positive_control",
            mode=None,
            statistic_name=name,
            statistic=None,
            bound=1.0,
            valid=False,
            reason=reason,
            text=reason,
        )
    rows = table.select(CONTROL, terms.rung)
    walk = _Walk(rows, set(), terms)
    beyond = []
    for key, row in rows.items():
        bound = walk.allowed(row)
        if bound is not None and not _ratio(row, bound) <= 1.0:
            beyond.append((key, _ratio(row, bound)))
    layer, site = place
    first = min(beyond, key=lambda item: _rank(item[0]), default=None)
    seen = first is not None and first[0][2:] == (layer, str(site))
    where = "nowhere" if first is None else f"at layer {first[0][2]} / {first[0][3]}"
    text = (
        f"{site} of layer {layer} scaled by 1 + {size:.1e} in the recorded decode step was found at its own address"
        if seen
        else f"a fault of {size:.1e} planted at layer {layer} / {site} was found {where}"
    )
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name=name,
        statistic=None if first is None else first[1],
        bound=1.0,
        valid=seen,
        reason=None if seen else text,
        minimum_detectable=size,
        text=text,
        detail={"layer": layer, "site": str(site), "relative_size": size, "planted_in": "values"},
    )


def _lost(table: DriftTable, terms: Terms) -> set[Key]:
    return {
        (value.prompt, value.position, NO_LAYER if value.layer is None else value.layer, str(value.site))
        for label, rung, value in table.unpaired
        if (label, rung) == (terms.mode, terms.rung)
    }


def _ratio(row: DriftRow, bound: float) -> float:
    if row.equal:
        return 0.0
    if row.n_lost or math.isinf(row.rel_l2) or bound == 0.0:
        return math.inf
    return row.rel_l2 / bound


def _self_noise(table: DriftTable, rung: str) -> dict[Place, float]:
    noise: dict[Place, float] = defaultdict(float)
    for row in table.select(SELF_NOISE, rung).values():
        if math.isfinite(row.rel_l2):
            noise[row.layer, row.site] = max(noise[row.layer, row.site], row.rel_l2)
    return dict(noise)


def _rank(key: Key) -> tuple[tuple[int, int], int]:
    return (rank_of(key), key[1])


def _fresh_evidence(
    terms: Terms, excess: dict[Key, float], beyond: tuple[Key, ...], n_judged: int, n_places: int
) -> Evidence:
    worst = max(excess.values(), default=None)
    assumed = "" if terms.arithmetic else ", the engine's arithmetic being unknown and taken for the coarsest"
    return Evidence(
        instrument="native",
        mode=terms.mode,
        statistic_name="largest difference at a site over what rounding can do there, given its inputs",
        statistic=worst,
        bound=1.0,
        supports=None if worst is None else ("H1" if beyond else "H0"),
        valid=worst is not None,
        reason=None if worst is not None else "no site has recorded inputs that agree closely enough in both passes",
        minimum_detectable=(_HALF if terms.dtype in HALF else _FULL)["product"] * terms.unit,
        text=f"{len(beyond)} of {len(excess)} values with known inputs, at {n_judged} of {n_places} layer sites, "
        f"differ beyond rounding at {terms.dtype}{assumed}",
        detail={"n_judged": n_judged, "n_places": n_places, "n_beyond": len({key[2:] for key in beyond})},
    )


def _noise_evidence(terms: Terms, worst: float, noise: dict[Place, float]) -> Evidence:
    """How the drift of sites with unequal inputs compares with the self-noise; it can only speak for H0."""
    return Evidence(
        instrument="self_noise",
        mode=terms.mode,
        statistic_name=f"largest drift with unequal inputs over {_SELF_NOISE_MARGIN:.0f} times the self-noise there",
        statistic=worst,
        bound=1.0,
        supports="H0" if worst <= 1.0 else None,
        minimum_detectable=_SELF_NOISE_MARGIN * max(noise.values()),
        text=f"two prefills of one token differ at {sum(value > 0.0 for value in noise.values())} of {len(noise)} "
        f"layer sites; decode drifts at most {worst:.2g} of what {_SELF_NOISE_MARGIN:.0f} times that allows",
    )
