"""Mixture of experts: where the two passes send a token to different experts, and how near the tie was.

A router picks the k experts with the largest logits. Rounding may turn a near tie round, and then the output of that
layer differs by as much as two experts do, with nothing wrong: what follows at that token is a consequence. A choice
can only turn if the gap between the last expert taken and the first one left out is at most twice the drift of the
logits. This instrument informs and never decides: whether the drift of the logits is rounding is for the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import NOTHING, Judges, Panel, Run, Seen
from kvdrift.pairing.align import Aligner
from kvdrift.trace.model import PassPair
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat, Evidence
from kvdrift.vocabulary.plan import PairRole
from kvdrift.vocabulary.sites import Site


@dataclass(frozen=True, slots=True)
class Flip:
    """One token that the passes route differently. `gap` is prefill's, between the last expert taken and the first one
    left out, and `drift` the largest difference of a logit."""

    mode: str
    address: Address
    gap: float
    drift: float


@dataclass(slots=True)
class RouterTable:
    """The choices of experts at the native dtype: how many were compared in each mode, and those that turned."""

    compared: dict[str, int] = field(default_factory=dict)
    flips: list[Flip] = field(default_factory=list)

    def add(self, pair: PassPair, n_chosen: int) -> None:
        """Compare the choices of `n_chosen` experts in both passes of `pair`."""
        mode = pair.mode
        for values in Aligner(pair, sites=frozenset({Site.ROUTER})).pairs():
            first, second = values.prefill.astype(np.float64), values.decode.astype(np.float64)
            if first.shape[1] <= n_chosen or not (np.isfinite(first).all() and np.isfinite(second).all()):
                continue
            self.compared[mode] = self.compared.get(mode, 0) + len(first)
            for index, position in enumerate(values.positions):
                chosen = [set(np.argsort(-logits[index], kind="stable")[:n_chosen]) for logits in (first, second)]
                if chosen[0] == chosen[1]:
                    continue
                ranked = np.sort(first[index])[::-1]
                self.flips.append(
                    Flip(
                        mode,
                        Address(pair.prefill.prompt, position, values.layer, Site.ROUTER),
                        gap=float(ranked[n_chosen - 1] - ranked[n_chosen]),
                        drift=float(np.abs(second[index] - first[index]).max()),
                    )
                )


def judge_router(table: RouterTable, mode: str) -> Evidence | None:
    """Return what was seen of the choices of `mode`, None for a model that showed no router."""
    n_compared = table.compared.get(mode, 0)
    if not n_compared:
        return None
    flips = [flip for flip in table.flips if flip.mode == mode]
    text = f"both passes chose the same experts for all {n_compared} tokens and layers"
    if flips:
        widest = max(flips, key=lambda flip: flip.gap)
        text = (
            f"{len(flips)} of {n_compared} choices of experts differ, the first at {flips[0].address}; the widest gap "
            f"that turned is {widest.gap:.2g}, where the logits drift by {widest.drift:.2g}"
        )
    return Evidence(
        instrument="router",
        mode=mode,
        statistic_name="choices of experts that differ",
        statistic=float(len(flips)),
        text=text,
        detail={"n_compared": n_compared, "widest_gap": max((flip.gap for flip in flips), default=None)},
    )


def router_caveat(table: RouterTable) -> Caveat | None:
    """Return what a reader of large drifts must know, None if no choice turned."""
    if not table.flips:
        return None
    places = {flip.address for flip in table.flips}
    return Caveat(
        "ROUTER_FLIP",
        f"{len(places)} tokens and layers were sent to other experts at a near tie, the first at "
        f"{table.flips[0].address}; drift of these tokens in the layers above is a consequence",
    )


@dataclass(slots=True)
class Router:
    """Compares the experts that both passes choose."""

    name: ClassVar[str] = "router"
    judges: ClassVar[Judges] = "mode"
    table: RouterTable = field(default_factory=RouterTable)

    def see(self, item: RecordedPair, run: Run) -> None:
        """Compare the choices of a native pair."""
        n_chosen = run.info.experts_per_token
        if item.role is PairRole.PAIR and item.pair.prefill.rung == run.info.dtype and n_chosen is not None:
            self.table.add(item.pair, n_chosen)

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Inform about a model that showed a router."""
        found = judge_router(self.table, mode)
        return NOTHING if found is None else Seen(evidence=(found,))
