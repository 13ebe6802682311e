"""Instrument 8, the positive control: every audit plants one small fault of its own and must find it.

If it does not, the audit was blind today, whatever it saw or did not see elsewhere.
"""

from __future__ import annotations

import math
from typing import ClassVar

import numpy as np

from kvdrift.compare.drift import DriftTable
from kvdrift.instruments.base import Blind, Judges, Panel, Run, Seen
from kvdrift.instruments.ladder import Bounds, Excess, climb_in, excess_of
from kvdrift.instruments.native import fresh_rows, judge_native
from kvdrift.instruments.recorded import judge_planted, terms_of
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence
from kvdrift.vocabulary.plan import CONTROL
from kvdrift.vocabulary.precision import RUNGS, Arithmetic, Rungs
from kvdrift.vocabulary.sites import Site

# Where the fault is planted: the query of one layer, or, in a model that does not show it, what a layer hands on.
SITES = (Site.Q_ROPE, Site.ATTN_OUT, Site.LAYER_OUT)

# The planted fault stands this far above the bound of its address: the smallest claim that still leaves room for the
# rounding of the planting itself.
_ABOVE_BOUND = 16.0


def planted_size(bound: float) -> float:
    """Return the relative size of the fault to plant, given the rounding bound of its address.

    A power of two, so that planting it rounds nothing.
    """
    return float(2.0 ** math.ceil(math.log2(_ABOVE_BOUND * bound)))


def native_places(table: DriftTable, mode: str, arithmetic: Arithmetic) -> list[Address]:
    """Return where a fault can be planted for the native instruments, best first: addresses that they judge.

    The query is where a fault is hardest to see, so it comes first; the norm before attention is there in every model.
    """
    rows = fresh_rows(table, mode, arithmetic)
    for site in (*SITES, Site.ATTN_NORM_OUT):
        if (found := rows.is_at(site)).any():
            return rows.addresses(found)
    return []


def size_at_native(site: Site, arithmetic: Arithmetic) -> float:
    """Return the relative size of the fault to plant at the native dtype: the smallest power of two above the bound."""
    return float(2.0 ** (math.floor(math.log2(arithmetic.bound(site))) + 1))


def judge_control(
    table: DriftTable,
    bounds: Bounds,
    place: Place | None,
    size: float | None,
    rungs: Rungs = RUNGS,
) -> Evidence:
    """Say whether the planted fault was found on the ladder, and at the address where it was planted."""
    return _judge(excess_of(table.select(CONTROL, rungs.upper), bounds, rungs), place, size)


def judge_control_at_native(
    table: DriftTable,
    arithmetic: Arithmetic,
    place: Place | None,
    size: float | None,
) -> Evidence:
    """Say whether the native instruments found the planted fault, and at the address where it was planted."""
    if place is None:
        text = "no fault was planted: the native instruments judge no address of this run at which one could be"
        return _blind(text, None, None, {})
    found = judge_native(table, CONTROL, arithmetic)
    rows = fresh_rows(table, CONTROL, arithmetic)
    return _judge(Excess(rows, rows.by_place(found.excess)), place, size)


def _judge(excess: Excess, place: Place | None, size: float | None) -> Evidence:
    if place is None or size is None:
        return _blind("no fault was planted", None, None, {})
    layer, site = place
    beyond = excess.where(excess.values > 1.0)
    detail: dict[str, object] = {"layer": layer, "site": str(site), "relative_size": size, "n_beyond": len(beyond)}
    if not len(beyond):
        return _blind(f"a fault of {size:.1e} planted at layer {layer} / {site} was not seen", size, None, detail)
    first = beyond.rows.places[beyond.rows.place[np.argmin(beyond.rows.rank)]]
    here = beyond.rows.by_place({place: 1.0}) == 1.0
    if first != place:
        return _blind(
            f"the fault planted at layer {layer} / {site} was found at {first}",
            size,
            beyond.where(here).largest,
            detail,
        )
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name="drift of the planted fault over its rounding bound",
        statistic=beyond.where(here).largest,
        bound=1.0,
        supports=None,
        minimum_detectable=size,
        text=f"{site} scaled by 1 + {size:.1e} in one decode step was found at its own address, layer {layer}",
        detail=detail,
    )


def _blind(reason: str, size: float | None, statistic: float | None, detail: dict[str, object]) -> Evidence:
    return Evidence(
        instrument="positive_control",
        mode=None,
        statistic_name="drift of the planted fault over its rounding bound",
        statistic=statistic,
        bound=1.0,
        valid=False,
        reason=reason,
        minimum_detectable=size,
        text=reason,
        detail=detail,
    )


class Control(Blind):
    """Checks that the planted fault was found, at the address where it was planted."""

    name: ClassVar[str] = "positive_control"
    judges: ClassVar[Judges] = "run"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Look for it with the instruments that decide about this run."""
        return Seen(evidence=(self._judge(run, panel),))

    def _judge(self, run: Run, panel: Panel) -> Evidence:
        plant, info = run.plant, run.info
        place, size = (None, None) if plant is None else (Place(plant.layer, plant.site), plant.factor - 1.0)
        if run.plan.ladder == "off":
            return judge_control_at_native(run.table, info.arithmetic, place, size)
        if run.foreign is not None and info.ladder.upper not in run.table.rungs:
            return judge_planted(run.table, terms_of(run, str(run.control_mode)), place, size)
        bounds = climb_in(panel, run.control_mode).bounds if run.control_mode in run.modes else {}
        return judge_control(run.table, bounds, place, size, info.ladder)
