"""Where the positive control is planted, and the decode steps that have it: small faults that the audit must see."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from kvdrift.capture.modes import PlantedStep
from kvdrift.engines.base import LiveEngine
from kvdrift.errors import CaptureError
from kvdrift.instruments.base import Panel
from kvdrift.instruments.control import KINDS, SITES, Control, places_beyond, planted_size, size_at_native
from kvdrift.instruments.ladder import Climb, climb, rounding_bounds
from kvdrift.instruments.native import fresh_rows, judge_native
from kvdrift.instruments.recorded import plantable, terms_of
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.rows import Bools
from kvdrift.trace.model import PassPair, RowRecord, Slots, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.facts import Plant
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.precision import UPPER, Arithmetic
from kvdrift.vocabulary.sites import CACHE_SITES, Site

# Where noise allows for more, as where terms cancel, no fault of a size can be planted that stands above it.
_MOST_BOUND = 2.0**-6

# How many steps are tried for the control of the native instruments, until each kind of place is judged at one of them.
_TRIALS = 4


def capture_control(engine: LiveEngine, measured: Measured) -> list[RecordedPair]:
    """Plant a small fault in each kind of place, each in a decode step of its own of plain decode, in the sharpest mode
    that runs, and record them.

    The engine runs at `measured.control_rung`. A value that is zero stays zero whatever it is multiplied by, so no
    fault is planted there, nor where a mismatch stands already. Returns nothing where no fault can be planted.
    """
    return (_at_native if measured.plan.ladder == "off" else _on_ladder)(engine, measured)


def plants_on_ladder(
    measured: Measured, mode: Mode, pick: random.Random, is_zero: Callable[[Place], bool]
) -> Iterator[Plant]:
    """Yield faults just above what the ladder allows at places of their own, the best place first."""
    climbed = climb(measured.table, mode, measured.info.dtype, measured.info.ladder, measured.floors)
    for place in _places(SITES, climbed, pick):
        if not is_zero(place):
            yield Plant(place.layer, place.site, 1.0 + planted_size(climbed.bounds[place]))


def _places(sites: Sequence[Site], climbed: Climb, pick: random.Random) -> Iterator[Place]:
    """Yield places that have a bound and are within it: of each site all, in an order by chance."""
    failing = places_beyond(climbed.excess)
    for site in sites:
        here = [
            place
            for place, bound in climbed.bounds.items()
            if place.site is site and place not in failing and bound <= _MOST_BOUND
        ]
        yield from pick.sample(sorted(here, key=lambda place: place.forward_rank), len(here))


def _on_ladder(engine: LiveEngine, measured: Measured) -> list[RecordedPair]:
    mode = Mode.KV_ALIGNED if Mode.KV_ALIGNED in measured.modes else Mode.AS_DESIGNED
    pick = random.Random(measured.plan.seed)
    climbed = climb(measured.table, mode, measured.info.dtype, measured.info.ladder, measured.floors)
    compared = set(climbed.excess.rows.places) - measured.table.unplantable(mode)
    climbed = replace(climbed, bounds={place: b for place, b in climbed.bounds.items() if place in compared})
    if not climbed.bounds:
        return []
    prompt = min(measured.prompts, key=lambda item: len(item.tokens))
    step = PlantedStep(engine, prompt, mode, measured.control_rung, pick.choice(prompt.probed))
    found = []
    for sites in KINDS.values():
        plants = (
            plant
            for place in _places(sites, climbed, pick)
            if (plant := _plant_at(step.prefill, place, planted_size(climbed.bounds[place]))) is not None
        )
        pair = _first_planted(step, plants)
        if pair is not None:
            found.append(pair)
    step.close()
    return found


def _first_planted(step: PlantedStep, plants: Iterator[Plant]) -> RecordedPair | None:
    """Record the first fault that the engine can commit. One that it cannot at some site, it cannot at any layer."""
    cannot: set[Site] = set()
    for plant in plants:
        if plant.site in cannot:
            continue
        try:
            return RecordedPair(PairRole.CONTROL, step.record(plant), plant=plant)
        except CaptureError:
            cannot.add(plant.site)
    return None


def _plant_at(prefill: Trace, place: Place, size: float) -> Plant | None:
    """Return the fault whose drift at `place` is `size`, None where prefill's value is zero, not finite or not there.

    In a cache it is in one row, the first that is not zero and that attention sees, and as much larger as that row is
    smaller than all of them.
    """
    if place.site not in CACHE_SITES:
        norm = _norm_at(prefill, place)
        return None if norm is None else Plant(place.layer, place.site, 1.0 + size)
    for read in prefill.cache_reads():
        if (read.layer, read.site) != (place.layer, place.site):
            continue
        norms = np.linalg.norm(read.rows.astype(np.float64).reshape(len(read.rows), -1), axis=1)
        seen = _seen_slots(prefill, place)
        norms = norms if seen is None else np.where(np.isin(read.slots, seen), norms, 0.0)
        total = float(np.linalg.norm(norms))
        at = int(np.argmax(norms > 0.0))
        if not 0.0 < total < np.inf:
            return None
        factor = float(2.0 ** np.ceil(np.log2(size * total / norms[at])))
        return Plant(place.layer, place.site, 1.0 + factor, int(read.slots[at]))
    return None


def _seen_slots(trace: Trace, place: Place) -> Slots | None:
    """The slots that attention does not hide from any head's query of the last recorded position, None if its scores
    were not recorded. What a window or a chunk hides is not compared, so a fault there is not seen."""
    record = next((r for r in trace.rows if (r.layer, r.site) == (place.layer, Site.ATTN_SCORES)), None)
    if record is None or record.slots is None:
        return None
    hidden: Bools = np.isneginf(record.values[-1].astype(np.float64)).all(axis=0)
    return np.asarray(record.slots[~hidden])


def _norm_at(trace: Trace, place: Place) -> float | None:
    """The norm of what a trace of one position holds at a place; None if it is zero, not finite or not there."""
    record = next((r for r in trace.rows if (r.layer, r.site) == tuple(place)), None)
    norm = 0.0 if record is None else float(np.linalg.norm(record.values[-1].astype(np.float64).ravel()))
    return norm if 0.0 < norm < np.inf else None


def is_zero_at(trace: Trace, place: Place, position: int) -> bool:
    """Whether a trace holds nothing but zeros at a place and position, or nothing at all."""
    for record in trace.rows:
        if (record.layer, record.site) == tuple(place) and position in record.positions:
            return not np.any(record.values[record.positions.index(position)])
    return True


def _at_native(engine: LiveEngine, measured: Measured) -> list[RecordedPair]:
    """Plant where the native instruments judge. The control's prefill is shorter than the run's, and its kernels may
    round otherwise: a place whose inputs are not equal there is not judged, and another step is taken."""
    if Mode.KV_ALIGNED not in measured.modes:
        return []
    arithmetic, pick = measured.info.arithmetic, random.Random(measured.plan.seed)
    rows = fresh_rows(measured.table, Mode.KV_ALIGNED, arithmetic)
    barred = set(judge_native(measured.table, Mode.KV_ALIGNED, arithmetic).first)
    barred |= measured.table.unplantable(Mode.KV_ALIGNED)
    units = sorted({(address.prompt, address.position) for address in rows.addresses()})
    prompts = {prompt.name: prompt for prompt in measured.prompts}
    found: dict[str, RecordedPair] = {}
    blind: list[RecordedPair] = []
    for name, position in pick.sample(units, min(_TRIALS, len(units))):
        step = PlantedStep(engine, prompts[name], Mode.KV_ALIGNED, arithmetic.dtype, position)
        here = [a.place for a in rows.addresses() if (a.prompt, a.position) == (name, position)]
        for kind, sites in KINDS.items():
            if kind in found:
                continue
            places = [place for site in sites for place in here if place.site is site and place not in barred]
            plants = (
                plant
                for place in sorted(places, key=lambda p: (sites.index(p.site), pick.random()))
                if (plant := _plant_at(step.prefill, place, size_at_native(place.site, arithmetic))) is not None
            )
            item = _first_planted(step, plants)
            if item is not None and _is_judged(item, arithmetic):
                found[kind] = item
            elif item is not None:
                blind.append(item)
        step.close()
        if len(found) == len(KINDS):
            break
    return [found[kind] for kind in KINDS if kind in found] or blind[:1]


def _is_judged(item: RecordedPair, arithmetic: Arithmetic) -> bool:
    """Whether the place of a planted fault is judged in its own pair."""
    assert item.plant is not None
    trial = DriftTable()
    trial.add(item.pair, PairRole.CONTROL, with_hashes=False)
    rows = fresh_rows(trial, PairRole.CONTROL, arithmetic)
    return any(address.place == (item.plant.layer, item.plant.site) for address in rows.addresses())


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
