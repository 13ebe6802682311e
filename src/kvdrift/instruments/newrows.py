"""New rows: the key and the value of the token itself as decode reads them, each head held against those of prefill.

A read of the cache has one row that decode wrote in this step. Where what enters the cache was recorded, that row is a
copy of it. Where it was not, as of an engine of one's own, the difference of the whole read is all there is: one row of
a thousand may be off by half and leave the read within a rounding. So it is looked at by itself, with aligned inputs
and at the native dtype: what makes it of an input with the same bits is a norm, a product, a norm of heads and a
rotation, at most.

Blind to rows of quantised caches, and to those of layers whose keys stand in another frame or hold a factor.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.instruments.walk import Walk
from kvdrift.pairing.slots import without_copies
from kvdrift.trace.model import CacheRead, PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES, PARENTS, Site

# What makes a row of the input of a layer, of which any may not have been recorded.
_MAKES = {
    Site.K_CACHE: (Site.ATTN_NORM_OUT, Site.K_PROJ, Site.K_NORM, Site.K_ROPE),
    Site.V_CACHE: (Site.ATTN_NORM_OUT, Site.V_PROJ),
}


@dataclass(slots=True)
class NewRows:
    """Holds the rows that decode wrote in each step against those of prefill.

    `off` is by how much the worst head of each differs, relative to a typical row of that head.
    """

    name: ClassVar[str] = "new_rows"
    judges: ClassVar[Judges] = "mode"
    off: dict[Address, float] = field(default_factory=dict)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Look at a native pair with aligned inputs."""
        pair, arithmetic = item.pair, run.info.arithmetic
        is_plain = run.foreign is None and arithmetic.can_judge and not arithmetic.is_configured
        if not is_plain or item.role is not PairRole.PAIR or pair.mode is not Mode.KV_ALIGNED:
            return
        if pair.prefill.rung == arithmetic.dtype and pair.prefill.prompt not in run.quantised:
            self.off.update(_differences(pair))

    def suspected(self, pair: PassPair, run: Run) -> Sequence[Address]:
        """Return the rows of a pair that are beyond rounding, whatever they are made of."""
        bounds = {site: _bound(site, run.info.arithmetic) for site in CACHE_SITES} if self.off else {}
        prompt = pair.prefill.prompt
        return [at for at, off in self.off.items() if at.prompt == prompt and not off <= bounds[at.site]]

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Judge the rows that are made of equal inputs, where what entered the cache was not recorded."""
        if mode != Mode.KV_ALIGNED or not (judged := self._judged(run)):
            return NOTHING
        bounds = {site: _bound(site, run.info.arithmetic) for site in {address.site for address in judged}}
        excess = {address: off / bounds[address.site] for address, off in judged.items()}
        beyond = [address for address, value in excess.items() if not value <= 1.0]
        worst = max(excess.values())
        evidence = Evidence(
            instrument=self.name,
            mode=mode,
            statistic_name="largest difference of a row that decode wrote itself over what rounding can do",
            statistic=worst,
            bound=1.0,
            supports="H1" if beyond else "H0",
            minimum_detectable=max(bounds.values()),
            text=f"{len(beyond)} of {len(judged)} new rows with equal inputs differ beyond rounding",
            detail={"n_rows": len(judged), "n_beyond": len(beyond)},
        )
        return Seen(evidence=(evidence,), begins=tuple(beyond), beyond=tuple(beyond))

    def _judged(self, run: Run) -> dict[Address, float]:
        """The differences of rows whose inputs have the same bits, and of which it is not known what was stored."""
        rows = run.table.select(Mode.KV_ALIGNED, run.info.dtype)
        walk = Walk(rows, run.table.lost(Mode.KV_ALIGNED, run.info.dtype))
        is_told = np.ones(len(rows), dtype=bool)
        for site in CACHE_SITES:
            at = np.flatnonzero(rows.is_at(site))
            is_told[at] = np.logical_and.reduce([walk.is_recorded(at, parent) for parent in PARENTS[site]])
        chosen = np.flatnonzero(rows.is_at(*CACHE_SITES) & ~is_told & walk.is_fresh())
        left_out = run.table.in_frames(Mode.KV_ALIGNED)
        return {
            address: self.off[address]
            for address in rows.addresses(chosen)
            if address in self.off and address.place not in left_out
        }


def _bound(site: Site, arithmetic: Arithmetic) -> float:
    """What rounding may do to a row, relative and in the 2-norm, if all that makes it is computed twice."""
    return math.hypot(*(arithmetic.bound(made) for made in _MAKES[site]))


def _differences(pair: PassPair) -> Iterator[tuple[Address, float]]:
    """By how much the own row of each probed token differs; what is not finite is infinitely off."""
    prefill, decode = (_reads_of(trace, pair.positions) for trace in (pair.prefill, pair.decode))
    for key in prefill.keys() & decode.keys():
        layer, site, position = key
        first, second = without_copies(prefill[key], decode[key])
        own = [np.flatnonzero(read.slots == position) for read in (first, second)]
        if any(len(at) != 1 for at in own) or first.rows.shape[1:] != second.rows.shape[1:]:
            continue
        right, wrong = first.rows[own[0][0]], second.rows[own[1][0]]
        address = Address(pair.prefill.prompt, position, layer, site)
        if right.dtype == wrong.dtype and right.tobytes() == wrong.tobytes():
            yield address, 0.0
            continue
        with np.errstate(invalid="ignore", over="ignore"):
            size = np.linalg.norm(first.rows.astype(np.float64), axis=-1)
            off = np.linalg.norm(wrong.astype(np.float64) - right.astype(np.float64), axis=-1)
        typical = np.maximum(size[own[0][0]], np.median(size, axis=0))
        share = np.divide(off, typical, out=np.where(off == 0.0, 0.0, np.inf), where=typical > 0.0)
        yield address, float(np.nan_to_num(share, nan=np.inf).max())


def _reads_of(trace: Trace, wanted: Sequence[int]) -> dict[tuple[int, Site, int], CacheRead]:
    """The reads of a trace at the probed positions."""
    return {
        (read.layer, read.site, position): read
        for read in trace.cache_reads()
        for position in read.positions
        if position in wanted
    }
