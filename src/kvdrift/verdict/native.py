"""What the native instruments say together about one mode: fresh sites, replay and the directed tests."""

from __future__ import annotations

from dataclasses import dataclass

from kvdrift.address import Address
from kvdrift.compare.drift import NO_LAYER, DriftTable
from kvdrift.instruments.directed import Directed, judge_replay
from kvdrift.instruments.ladder import Key
from kvdrift.instruments.native import judge_native
from kvdrift.instruments.replay import ReplayTable
from kvdrift.plan import Mode
from kvdrift.sites import Site
from kvdrift.trace.model import Roundoffs
from kvdrift.verdict.model import Evidence


@dataclass(frozen=True, slots=True)
class NativeJudgement:
    """The first address beyond noise at the native dtype, None if there is none, and the evidence for it."""

    first: Address | None
    evidence: tuple[Evidence, ...]
    causes: tuple[Directed, ...]
    n_beyond: int

    @property
    def is_valid(self) -> bool:
        """Whether any of the instruments could judge."""
        return any(item.valid for item in self.evidence)


def judge_at_native(
    table: DriftTable,
    replay: ReplayTable,
    mode: str,
    native: str,
    *,
    alpha: float,
    seed: int,
    roundoffs: Roundoffs | None = None,
) -> NativeJudgement:
    """Judge one mode at the native dtype; fresh sites need the aligned inputs of kv_aligned."""
    evidence: list[Evidence] = []
    keys: list[Key] = []
    causes: tuple[Directed, ...] = ()
    if mode == Mode.KV_ALIGNED:
        fresh = judge_native(table, mode, native, roundoffs)
        evidence.append(fresh.evidence)
        keys += fresh.first.values()
    if any(row.mode == mode for row in replay.rows):
        replayed = judge_replay(replay.rows, mode, native, alpha, seed, roundoffs)
        evidence += replayed.evidence
        causes = replayed.causes
        keys += [*replayed.beyond, *(cause.address for cause in causes)]
    addresses = [
        Address(prompt, position, None if layer == NO_LAYER else layer, Site(site))
        for prompt, position, layer, site in keys
    ]
    first = min(addresses, key=lambda a: a.forward_rank, default=None)
    return NativeJudgement(first, tuple(evidence), causes, len(set(addresses)))
