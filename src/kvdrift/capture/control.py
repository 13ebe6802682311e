"""Where the positive control is planted, and the decode step that has it: one small fault that the audit must see."""

from __future__ import annotations

import random
from collections.abc import Iterator

import numpy as np

from kvdrift.capture.modes import capture_planted
from kvdrift.compare.drift import DriftTable
from kvdrift.engines.base import Engine
from kvdrift.instruments.base import Panel
from kvdrift.instruments.control import SITES, Control, native_places, planted_size, size_at_native
from kvdrift.instruments.ladder import climb, rounding_bounds
from kvdrift.instruments.native import fresh_rows
from kvdrift.instruments.recorded import plantable, terms_of
from kvdrift.measure.measured import Measured
from kvdrift.trace.model import PassPair, RowRecord, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.facts import Plant
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import UPPER
from kvdrift.vocabulary.sites import Site

# How many places are tried for the control of the native instruments, until one is judged by them.
_TRIALS = 4


def capture_control(engine: Engine, measured: Measured) -> RecordedPair | None:
    """Plant one small fault in one decode step of plain decode, in the sharpest mode that runs, and record it.

    The engine runs at `measured.control_rung`. Returns None where no fault can be planted.
    """
    return (_at_native if measured.plan.ladder == "off" else _on_ladder)(engine, measured)


def choose_on_ladder(measured: Measured, mode: Mode, pick: random.Random) -> Plant | None:
    """Return a fault just above what the ladder allows at a place of its own, None if no place has a bound."""
    bounds = climb(measured.table, mode, measured.info.dtype, measured.info.ladder).bounds
    site = next((site for site in SITES if any(site is place.site for place in bounds)), None)
    if site is None:
        return None
    layer = pick.choice(sorted(place.layer for place in bounds if place.site is site and place.layer is not None))
    return Plant(layer, site, 1.0 + planted_size(bounds[Place(layer, site)]))


def _on_ladder(engine: Engine, measured: Measured) -> RecordedPair | None:
    mode = Mode.KV_ALIGNED if Mode.KV_ALIGNED in measured.modes else Mode.AS_DESIGNED
    pick = random.Random(measured.plan.seed)
    plant = choose_on_ladder(measured, mode, pick)
    if plant is None:
        return None
    prompt = min(measured.prompts, key=lambda item: len(item.tokens))
    pair = capture_planted(engine, prompt, mode, measured.control_rung, pick.choice(prompt.probed), plant)
    return RecordedPair(PairRole.CONTROL, pair, plant=plant)


def _at_native(engine: Engine, measured: Measured) -> RecordedPair | None:
    """Plant where the native instruments judge. The control's prefill is shorter than the run's, and its kernels may
    round otherwise: a place whose inputs are not equal there is not judged, and another one is taken."""
    arithmetic = measured.info.arithmetic
    places = native_places(measured.table, Mode.KV_ALIGNED, arithmetic)
    if Mode.KV_ALIGNED not in measured.modes or not places:
        return None
    prompts = {prompt.name: prompt for prompt in measured.prompts}
    found = None
    for address in random.Random(measured.plan.seed).sample(places, min(_TRIALS, len(places))):
        assert address.layer is not None  # controls are planted inside layers
        plant = Plant(address.layer, address.site, 1.0 + size_at_native(address.site, arithmetic))
        pair = capture_planted(
            engine, prompts[address.prompt], Mode.KV_ALIGNED, arithmetic.dtype, address.position, plant
        )
        found = RecordedPair(PairRole.CONTROL, pair, plant=plant)
        trial = DriftTable()
        trial.add(pair, PairRole.CONTROL, with_hashes=False)
        if fresh_rows(trial, PairRole.CONTROL, arithmetic).index(address) is not None:
            break
    return found


# --------------------------------------------------------------------------------------------------- recorded values


def is_control_seen(measured: Measured) -> bool:
    """Whether the fault that was planted is found at its own address."""
    panel = Panel(measured, measured.instruments)
    return all(evidence.valid for evidence in panel.seen(Control.name).evidence)


def plant_in_values(measured: Measured, item: RecordedPair, *, anew: bool = False) -> RecordedPair | None:
    """Return a foreign pair with the positive control planted in the recorded values of one decode step.

    It belongs on the finest rung that there is: one at a finer rung takes the place of an earlier one. None where
    nothing is to be planted, or can be. `anew` plants where a fault was planted before, by the bounds known now.
    """
    pair, rung = item.pair, item.pair.prefill.rung
    if item.role is not PairRole.PAIR or rung not in (measured.info.dtype, UPPER):
        return None
    if anew and _has_control_at(measured, UPPER) != (rung == UPPER):
        return None
    if not anew and measured.plant is not None and (rung != UPPER or _has_control_at(measured, UPPER)):
        return None
    found = _place_on_ladder(measured, pair) if rung == UPPER else _place_at_native(measured, pair)
    if found is None:
        return None
    address, size = found
    if address.layer is None:
        return None
    plant = Plant(address.layer, address.site, 1.0 + size)
    decode = _scaled(pair.decode, plant, address.position)
    if decode is None:
        return None
    pair = PassPair(pair.mode, pair.prefill, decode, (address.position,))
    return RecordedPair(PairRole.CONTROL, pair, plant=plant)


def _has_control_at(measured: Measured, rung: str) -> bool:
    return len(measured.table.select(PairRole.CONTROL, rung)) > 0


def _place_on_ladder(measured: Measured, pair: PassPair) -> tuple[Address, float] | None:
    bounds = rounding_bounds(measured.table, pair.mode)
    rows = measured.table.select(pair.mode, UPPER)
    bound = rows.by_place(bounds)
    fits = rows.of_prompt(pair.prefill.prompt) & ~rows.is_outside & (rows.rel_l2 <= bound)
    for site in (*SITES, *Site):
        found = np.flatnonzero(fits & rows.is_at(site))
        if len(found):
            first = found[np.argmin(rows.layer[found])]
            return rows.addresses(first[None])[0], planted_size(float(bound[first]))
    return None


def _place_at_native(measured: Measured, pair: PassPair) -> tuple[Address, float] | None:
    return plantable(measured.table, terms_of(measured, pair.mode), pair.prefill.prompt)


def _scaled(trace: Trace, plant: Plant, position: int) -> Trace | None:
    """Return a copy of a trace with the planted fault at one position; None if its values are not rows of the trace,
    or do not change."""
    hit = False

    def planted() -> Iterator[RowRecord]:
        nonlocal hit
        for record in trace.rows:
            if (record.layer, record.site) != (plant.layer, plant.site) or position not in record.positions:
                yield record
                continue
            values, index = record.values.copy(), record.positions.index(position)
            values[index] = (values[index].astype(np.float64) * plant.factor).astype(values.dtype)
            hit = hit or bool((values[index] != record.values[index]).any())
            yield RowRecord(record.layer, record.site, record.positions, values, record.slots)

    rows = list(planted())
    if not hit:
        return None
    return Trace(
        trace.prompt,
        trace.pass_name,
        PairRole.CONTROL,
        trace.rung,
        trace.tokens,
        trace.calls,
        rows,
        trace.cache,
        trace.attention,
    )
