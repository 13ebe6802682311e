"""Whether the capture is alive: different prompts must give different keys and values, or old values were recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import Blind, Judges, Panel, Run, Seen
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import NO_HASH
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.sites import Site

_SITES = ((Site.K_CACHE, Site.K_ROPE, Site.K_PROJ), (Site.V_CACHE, Site.V_PROJ))


def check_freshness(
    table: DriftTable, native: str, modes: Sequence[str], probed_tokens: Mapping[str, Sequence[int]]
) -> list[Evidence]:
    """Return one evidence for K and one for V: do the hashes of prefill vary across prompts?

    Traces without a cache are judged by the keys and values that enter it. Judged at the deepest recorded layer, whose
    keys depend on the whole prompt; at layer 0 the same token may rightly have the same key. Prompts of the same tokens
    are not compared.
    """
    return [_check(table, native, modes, probed_tokens, _recorded(table, native, sites)) for sites in _SITES]


def _recorded(table: DriftTable, native: str, sites: tuple[Site, ...]) -> Site:
    """The first of `sites` that was recorded; what enters the cache counts only above the first layer."""
    rows = table.where(lambda block: block.rung == native)
    for site in sites:
        found = rows.where(rows.is_at(site))
        if len(found) and (site is sites[0] or found.layer.max() > 0):
            return site
    return sites[0]


def _check(
    table: DriftTable, native: str, modes: Sequence[str], tokens: Mapping[str, Sequence[int]], site: Site
) -> Evidence:
    name = f"{site.value[0].upper()} hashes across prompts"
    rows = table.where(lambda block: block.rung == native and block.mode in modes)
    rows = rows.where(rows.is_at(site) & (rows.sha256_prefill != np.void(NO_HASH)))
    deepest = max((layer for layer, _ in rows.places if layer is not None), default=None)
    hashes: dict[str, bytes] = {}
    for index in np.flatnonzero(rows.layer == deepest).tolist():
        hashes.setdefault(rows.names[rows.prompt[index]], bytes(rows.sha256_prefill[index]))
    prompts = [name for name in hashes if name in tokens]
    same = [
        (first, second)
        for i, first in enumerate(prompts)
        for second in prompts[i + 1 :]
        if hashes[first] == hashes[second] and tuple(tokens[first]) != tuple(tokens[second])
    ]
    n_distinct = len(set(hashes.values()))
    if len(prompts) < 2:
        text = f"only {len(prompts)} prompt with {site}, so nothing can vary"
    else:
        text = f"{n_distinct} different {site} hashes for {len(prompts)} prompts at layer {deepest}"
    return Evidence(
        instrument=f"freshness_{site.value[0]}",
        mode=None,
        statistic_name=name,
        statistic=float(n_distinct),
        supports="H0" if len(prompts) > 1 and not same else None,
        valid=not same,
        reason=f"the prompts {same[0][0]} and {same[0][1]} have the same {site}: the capture is stale"
        if same
        else None,
        text=text,
        detail={"n_prompts": len(prompts), "n_distinct": n_distinct},
    )


class Freshness(Blind):
    """Checks that different prompts gave different keys and values."""

    name: ClassVar[str] = "freshness"
    judges: ClassVar[Judges] = "run"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Check the hashes of prefill, for K and for V."""
        return Seen(evidence=tuple(check_freshness(run.table, run.info.dtype, run.modes, run.probed_tokens)))
