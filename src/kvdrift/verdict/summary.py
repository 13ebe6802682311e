"""Figures of a judged route that its report shows, computed once: hashes, alignment, attention, coverage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from kvdrift.instruments.ladder import Excess
from kvdrift.instruments.native import inputs_of
from kvdrift.instruments.route import Route
from kvdrift.measure.attention import AttentionTable, RunningStats
from kvdrift.measure.measured import Measured
from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import is_absent
from kvdrift.vocabulary.sites import EXPECTED_SITES, FORWARD_ORDER, Site

_PROJECTIONS = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ)


@dataclass(frozen=True, slots=True, kw_only=True)
class ProjectionHash:
    """A projection of one layer, prompt and mode; the hashes are of its first probed position.

    `excess` is the largest drift over its bound on the ladder, None if one of the positions has none.
    """

    mode: str
    tensor: str
    layer: int | None
    prompt: str
    position: int
    sha256_prefill: str | None
    sha256_decode: str | None
    n_positions: int
    n_exact: int
    max_ulp: float
    max_rel_l2: float
    excess: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheAlignment:
    """Whether the rows of K or of V that decode reads are those that prefill wrote; None where it is not known."""

    n_reads: int
    bitwise: bool | None
    within_noise: bool | None
    n_exact: int
    n_bad_slots: int
    n_lost_slots: int
    max_excess: float | None


@dataclass(frozen=True, slots=True)
class LargestExcess:
    """The largest drift over its bound among `n` pairs, None if there are none."""

    n: int
    value: float | None


@dataclass(frozen=True, slots=True)
class ModeFigures:
    """Figures of one mode: alignment of K and of V, and the largest excess of cache reads and attention outputs."""

    alignment: Mapping[str, CacheAlignment]
    cache: LargestExcess
    outputs: LargestExcess

    def aligned(self, how: str) -> bool | None:
        """Return whether both K and V are aligned, `how` being "bitwise" or "within_noise"."""
        both: list[bool | None] = [getattr(item, how) for item in self.alignment.values()]
        return None if None in both else all(both)


@dataclass(frozen=True, slots=True, kw_only=True)
class Coverage:
    """What was compared: in how many layers by site, at which rungs, on which routes."""

    n_layers_of_site: Mapping[Site, int]
    not_offered: tuple[Site, ...]
    in_some_layers_only: tuple[Site, ...]
    n_layers_wanted: int
    n_unpaired: int
    rungs: tuple[str, ...]
    routes: tuple[Route, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """All of these figures. `attention` is by mode, site and pass, and in it by layer, with "all" for the sum.

    `judged_inputs` says in words what the sites have in common that are judged at the native dtype.
    """

    projections: tuple[ProjectionHash, ...]
    modes: Mapping[str, ModeFigures]
    attention: Mapping[tuple[str, str, str], Mapping[str, RunningStats]]
    coverage: Coverage
    judged_inputs: str


def summarise(measured: Measured, decision: Decision) -> Summary:
    """Compute the figures of a route."""
    return Summary(
        tuple(_projections(measured, decision)),
        {mode: _mode(measured, decision, mode) for mode in measured.modes},
        _attention(measured.attention),
        _coverage(measured),
        inputs_of(measured.info.arithmetic),
    )


def _projections(measured: Measured, decision: Decision) -> list[ProjectionHash]:
    order = {prompt.name: index for index, prompt in enumerate(measured.prompts)}
    found = [item for mode in measured.modes for item in _projections_of(measured, decision, mode)]
    return sorted(found, key=lambda i: (i.mode, Place(i.layer, Site(i.tensor)).forward_rank, order[i.prompt]))


def _projections_of(measured: Measured, decision: Decision, mode: str) -> Iterator[ProjectionHash]:
    rows = measured.table.select(mode, measured.info.dtype)
    values, is_known = decision.climbs[mode].excess.of(rows)
    at = np.flatnonzero(rows.is_at(*_PROJECTIONS))
    group = rows.place[at] * len(rows.names) + rows.prompt[at]
    by_group = np.lexsort((rows.position[at], group))
    groups = np.split(at[by_group], np.flatnonzero(np.diff(group[by_group])) + 1) if len(at) else []
    firsts = rows.where(np.array([here[0] for here in groups], dtype=np.intp))
    for here, first in zip(groups, firsts, strict=True):
        yield ProjectionHash(
            mode=mode,
            tensor=str(first.site),
            layer=first.layer,
            prompt=first.prompt,
            position=first.position,
            sha256_prefill=first.sha256_prefill,
            sha256_decode=first.sha256_decode,
            n_positions=len(here),
            n_exact=int(rows.equal[here].sum()),
            max_ulp=float(rows.max_ulp[here].max()),
            max_rel_l2=float(rows.rel_l2[here].max()),
            excess=float(values[here].max()) if is_known[here].all() else None,
        )


def _mode(measured: Measured, decision: Decision, mode: str) -> ModeFigures:
    excess = decision.climbs[mode].excess
    return ModeFigures(
        {
            "k": _alignment(measured, excess, mode, Site.K_CACHE),
            "v": _alignment(measured, excess, mode, Site.V_CACHE),
        },
        _largest(excess, Site.K_CACHE, Site.V_CACHE),
        _largest(excess, Site.ATTN_CTX, Site.ATTN_OUT),
    )


def _largest(excess: Excess, *sites: Site) -> LargestExcess:
    found = excess.where(excess.rows.is_at(*sites))
    return LargestExcess(len(found), found.largest)


def _alignment(measured: Measured, excess: Excess, mode: str, site: Site) -> CacheAlignment:
    native = measured.table.select(mode, measured.info.dtype)
    rows = native.where(native.is_at(site))
    values, is_known = excess.of(rows)
    judged = values[is_known]
    return CacheAlignment(
        n_reads=len(rows),
        bitwise=bool(rows.equal.all()) if len(rows) else None,
        within_noise=bool((judged <= 1.0).all()) if 0 < len(judged) == len(rows) else None,
        n_exact=int(rows.equal.sum()),
        n_bad_slots=int(rows.n_bad_slots.sum()),
        n_lost_slots=int(rows.n_lost.sum()),
        max_excess=float(judged.max()) if len(judged) else None,
    )


def _attention(table: AttentionTable) -> dict[tuple[str, str, str], dict[str, RunningStats]]:
    stats: dict[tuple[str, str, str], dict[str, RunningStats]] = {}
    for (mode, pass_name, site, layer), item in sorted(table.by_place.items()):
        stats.setdefault((mode, site, pass_name), {})[str(layer)] = item
    for by_layer in stats.values():
        total = RunningStats()
        for item in by_layer.values():
            total.merge(item)
        by_layer["all"] = total
    return stats


def _coverage(measured: Measured) -> Coverage:
    recorded: dict[Site, list[int | None]] = {}
    for layer, sites in measured.seen_sites.items():
        for site in sites:
            recorded.setdefault(site, []).append(layer)
    layers = measured.plan.layers
    wanted = measured.info.n_layers if layers is None else len(layers)
    in_order = sorted(recorded, key=lambda site: FORWARD_ORDER[site])
    return Coverage(
        n_layers_of_site={site: len(recorded[site]) for site in in_order},
        not_offered=tuple(
            site
            for site in EXPECTED_SITES
            if site not in recorded and (measured.foreign is None or not is_absent(measured.info, site))
        ),
        in_some_layers_only=tuple(s for s in in_order if None not in recorded[s] and len(recorded[s]) < wanted),
        n_layers_wanted=wanted,
        n_unpaired=len(measured.table.unpaired),
        rungs=tuple(sorted(measured.table.rungs)),
        routes=tuple(measured.routes),
    )
