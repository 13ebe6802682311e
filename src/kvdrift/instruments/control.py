"""Instrument 8, the positive control: every audit plants small faults of its own and must find them.

One is planted in each kind of place: what attention is given, a cached row, a product with weights, the head. If one of
them is not found at its own address, the audit was blind there today, whatever it saw or did not see elsewhere. A
MISMATCH needs no control: what was seen was seen.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import numpy as np

from kvdrift.instruments.base import Blind, Judges, Panel, Run, Seen
from kvdrift.instruments.ladder import Bounds, Excess, climb_in, excess_of, measured_excess
from kvdrift.instruments.native import fresh_rows, judge_native
from kvdrift.instruments.recorded import judge_planted, terms_of
from kvdrift.pairing.drift import DriftTable
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.facts import Plant
from kvdrift.vocabulary.plan import CONTROL, control_label
from kvdrift.vocabulary.precision import RUNGS, Arithmetic, Rungs
from kvdrift.vocabulary.sites import Site

# Where the fault of a scenario is planted: the query of one layer, or, in a model that does not show it, what a layer
# hands on.
SITES = (Site.Q_ROPE, Site.ATTN_OUT, Site.LAYER_OUT)

# Kinds of places of plain decode, each with its sites, best first. The query is where a fault is hardest to see; models
# without rotation may not show it, and the norm before attention is there in every model.
KINDS: Mapping[str, tuple[Site, ...]] = {
    "attention": (*SITES, Site.ATTN_NORM_OUT),
    "cached row": (Site.K_CACHE, Site.V_CACHE),
    "product": (Site.MLP_OUT, Site.ATTN_OUT),
    "head": (Site.LOGITS,),
}

# The planted fault stands this far above the bound of its address: the smallest claim that still leaves room for the
# rounding of the planting itself.
_ABOVE_BOUND = 16.0
_STATISTIC = "drift of the planted fault over its rounding bound"
# Why there is none without a ladder, whose bounds hold at every place.
NO_PLACE_AT_NATIVE = "the native instruments judge no address of this run at which one could be"


def planted_size(bound: float) -> float:
    """Return the relative size of the fault to plant, given the rounding bound of its address.

    A power of two, so that planting it rounds nothing.
    """
    return float(2.0 ** math.ceil(math.log2(_ABOVE_BOUND * bound)))


def size_at_native(site: Site, arithmetic: Arithmetic) -> float:
    """Return the relative size of the fault to plant at the native dtype: the smallest power of two above the bound."""
    return float(2.0 ** (math.floor(math.log2(arithmetic.bound(site))) + 1))


def judge_control(
    table: DriftTable,
    bounds: Bounds,
    plant: Plant | None,
    rungs: Rungs = RUNGS,
    *,
    label: str = CONTROL,
    known: Collection[Place] = (),
    measured: bool = False,
) -> Evidence:
    """Say whether a planted fault was found on the ladder, and at the address where it was planted.

    `known` are places that are beyond noise without it; `measured` says that the bounds come from measured noise.
    """
    rows = table.select(label, rungs.upper)
    return _judge(measured_excess(rows, bounds) if measured else excess_of(rows, bounds, rungs), plant, known)


def judge_control_at_native(
    table: DriftTable,
    arithmetic: Arithmetic,
    plant: Plant | None,
    *,
    label: str = CONTROL,
    known: Collection[Place] = (),
) -> Evidence:
    """Say whether the native instruments found a planted fault, and at the address where it was planted."""
    if plant is None:
        text = f"no fault was planted: {NO_PLACE_AT_NATIVE}"
        return _blind(text, None, None, {})
    found = judge_native(table, label, arithmetic)
    rows = fresh_rows(table, label, arithmetic)
    return _judge(Excess(rows, rows.by_place(found.excess)), plant, known)


def _judge(excess: Excess, plant: Plant | None, known: Collection[Place]) -> Evidence:
    if plant is None:
        return _blind("no fault was planted", None, None, {})
    place, size = Place(plant.layer, plant.site), plant.factor - 1.0
    beyond = excess.where(excess.values > 1.0)
    detail: dict[str, object] = {
        "layer": plant.layer,
        "site": str(plant.site),
        "relative_size": size,
        "n_beyond": len(beyond),
        **({} if plant.slot is None else {"slot": plant.slot}),
    }
    new = beyond.where(np.array([address.place not in known for address in beyond.rows.addresses()], dtype=bool))
    where = str(plant.site) if plant.layer is None else f"layer {plant.layer} / {plant.site}"
    if not len(new):
        return _blind(f"a fault of {size:.1e} planted at {where} was not seen", size, None, detail)
    first = new.rows.places[new.rows.place[np.argmin(new.rows.rank)]]
    here = new.rows.by_place({place: 1.0}) == 1.0
    if first != place:
        text = f"the fault planted at {where} was found at {first}"
        return _blind(text, size, new.where(here).largest, detail)
    row = "" if plant.slot is None else f", slot {plant.slot},"
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name=_STATISTIC,
        statistic=new.where(here).largest,
        bound=1.0,
        supports=None,
        minimum_detectable=None if plant.slot is not None else size,  # of one row, not of all that is read
        text=f"{plant.site}{row} scaled by 1 + {size:.1e} in one decode step was found at its own address"
        + ("" if plant.layer is None else f", layer {plant.layer}"),
        detail=detail,
    )


def _joined(found: Sequence[Evidence]) -> Evidence:
    """Put what was seen of several planted faults together: the control was seen if all of them were."""
    if len(found) == 1:
        return found[0]
    blind = [item for item in found if not item.valid]
    sizes = [item.minimum_detectable for item in found if item.minimum_detectable is not None]
    worst = [item.statistic for item in found if item.statistic is not None]
    text = "; ".join(item.text for item in blind or found)
    return replace(
        found[0],
        statistic=min(worst, default=None),
        valid=not blind,
        reason=text if blind else None,
        minimum_detectable=max(sizes, default=None),
        text=text,
        detail={**found[0].detail, "planted": [{**item.detail, "seen": item.valid} for item in found]},
    )


def _blind(reason: str, size: float | None, statistic: float | None, detail: dict[str, object]) -> Evidence:
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name=_STATISTIC,
        statistic=statistic,
        bound=1.0,
        valid=False,
        reason=reason,
        minimum_detectable=size,
        text=reason,
        detail=detail,
    )


class Control(Blind):
    """Checks that the planted faults were found, each at the address where it was planted."""

    name: ClassVar[str] = "positive_control"
    judges: ClassVar[Judges] = "run"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Look for them with the instruments that decide about this run."""
        if run.foreign is not None and run.info.ladder.upper not in run.table.rungs:
            return Seen(evidence=(self._in_values(run),))
        return Seen(evidence=(_joined(list(self._each(run, panel))),))

    def _in_values(self, run: Run) -> Evidence:
        plant = next(iter(run.plants), None)
        place, size = (None, None) if plant is None else (Place(plant.layer, plant.site), plant.factor - 1.0)
        return judge_planted(run.table, terms_of(run, str(run.control_mode)), place, size)

    def _each(self, run: Run, panel: Panel) -> Iterator[Evidence]:
        """Yield what was seen of each fault; of none, that none was planted."""
        info, mode = run.info, run.control_mode
        if run.plan.ladder == "off":
            known = set() if mode is None else set(judge_native(run.table, mode, info.arithmetic).first)
            for index, plant in enumerate(run.plants or [None]):
                yield judge_control_at_native(
                    run.table, info.arithmetic, plant, label=control_label(index), known=known
                )
            return
        climbed = climb_in(panel, mode) if mode in run.modes else None
        bounds = {} if climbed is None else climbed.bounds
        known = set() if climbed is None else places_beyond(climbed.excess)
        for index, plant in enumerate(run.plants or [None]):
            yield judge_control(
                run.table,
                bounds,
                plant,
                info.ladder,
                label=control_label(index),
                known=known,
                measured=mode is not None and run.floors.has(mode),
            )


def places_beyond(excess: Excess) -> set[Place]:
    """Return the places at which something is beyond noise."""
    return {address.place for address in excess.rows.addresses(excess.beyond)}
