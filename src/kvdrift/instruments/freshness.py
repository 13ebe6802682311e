"""Whether the capture is alive: different prompts must give different keys and values, or old values were recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import Judges, Panel, Run, Seen
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.reads import visible_keys
from kvdrift.pairing.rows import NO_HASH
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.sites import Site

_SITES = ((Site.K_CACHE, Site.K_ROPE, Site.K_PROJ), (Site.V_CACHE, Site.V_PROJ))


def check_freshness(
    table: DriftTable,
    native: str,
    modes: Sequence[str],
    probed_tokens: Mapping[str, Sequence[int]],
    last_reads: Mapping[tuple[str, int], int] | None = None,
) -> list[Evidence]:
    """Return one evidence for K and one for V: do the hashes of prefill vary across prompts?

    Traces without a cache are judged by the keys and values that enter it. Judged at the deepest recorded layer, whose
    keys depend on the whole prompt; at layer 0 the same token may rightly have the same key. Prompts of the same tokens
    are not compared, nor are rows of the cache that lie in a beginning that two prompts share: attention that chooses
    its keys may choose the same ones for two tokens.

    Args:
        table: the pairs.
        native: the dtype whose hashes are compared.
        modes: the modes whose hashes are compared.
        probed_tokens: by prompt, the tokens on which its first compared values depend.
        last_reads: by prompt and position, the last slot of the deepest layer that attention reads there, where that
            is known.
    """
    reads = last_reads or {}
    return [_check(table, native, modes, probed_tokens, _recorded(table, native, sites), reads) for sites in _SITES]


def _recorded(table: DriftTable, native: str, sites: tuple[Site, ...]) -> Site:
    """The first of `sites` that was recorded; what enters the cache counts only above the first layer."""
    rows = table.where(lambda block: block.rung == native)
    for site in sites:
        found = rows.where(rows.is_at(site))
        if len(found) and (site is sites[0] or found.layer.max() > 0):
            return site
    return sites[0]


def _check(
    table: DriftTable,
    native: str,
    modes: Sequence[str],
    tokens: Mapping[str, Sequence[int]],
    site: Site,
    reads: Mapping[tuple[str, int], int],
) -> Evidence:
    name = f"{site.value[0].upper()} hashes across prompts"
    rows = table.where(lambda block: block.rung == native and block.mode in modes)
    rows = rows.where(rows.is_at(site))
    rows = rows.where(rows.sha256_prefill != np.void(NO_HASH))  # hashes of few pairs: they are the widest column
    deepest = max((layer for layer, _ in rows.places if layer is not None), default=None)
    hashes: dict[str, bytes] = {}
    depends: dict[str, tuple[int, ...]] = {}
    for index in np.flatnonzero(rows.layer == deepest).tolist():
        name_of, position = rows.names[rows.prompt[index]], int(rows.position[index])
        if name_of in hashes:
            continue
        hashes[name_of] = bytes(rows.sha256_prefill[index])
        last = reads.get((name_of, position)) if site in (Site.K_CACHE, Site.V_CACHE) else None
        depends[name_of] = tuple(tokens.get(name_of, ()))[: None if last is None else last + 1]
    prompts = [name for name in hashes if name in tokens]
    same = [
        (first, second)
        for i, first in enumerate(prompts)
        for second in prompts[i + 1 :]
        if hashes[first] == hashes[second] and depends[first] != depends[second]
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


@dataclass(slots=True)
class Freshness:
    """Checks that different prompts gave different keys and values."""

    name: ClassVar[str] = "freshness"
    judges: ClassVar[Judges] = "run"
    last_reads: dict[tuple[str, int], int] = field(default_factory=dict)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Note which slot is the last that attention reads in the deepest layer, by the scores of prefill."""
        trace = item.pair.prefill
        if item.role is not PairRole.PAIR or trace.rung != run.info.dtype:
            return
        deepest: dict[int, int] = {}
        for (layer, position), slots in visible_keys(trace, item.pair.positions).items():
            if len(slots) and layer >= deepest.get(position, -1):
                deepest[position] = layer
                self.last_reads[trace.prompt, position] = int(slots.max())

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Check the hashes of prefill, for K and for V."""
        return Seen(
            evidence=tuple(
                check_freshness(run.table, run.info.dtype, run.modes, run.probed_tokens, self.last_reads),
            )
        )
