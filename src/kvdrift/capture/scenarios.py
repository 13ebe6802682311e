"""Runs the scenarios of an audit at one precision and hands on what they record."""

from __future__ import annotations

import random
from dataclasses import replace

from kvdrift.capture.control import is_zero_at, plants_on_ladder
from kvdrift.engines.base import NotPlanted
from kvdrift.instruments.ladder import climb
from kvdrift.measure.measured import Measured
from kvdrift.pairing.floors import SCALES
from kvdrift.scenarios.runner import Company, Script
from kvdrift.trace.recording import SHARED, PairSink, RecordedPair
from kvdrift.verdict.suite import Suite
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.progress import Progress
from kvdrift.vocabulary.sites import Site

# Segments whose references are perturbed beside the scenario itself.
_PERTURBED = 3


def capture_scenarios(suite: Suite, company: Company, rung: str, sink: PairSink, progress: Progress) -> None:
    """Hand the pairs of every scenario at the precision that the engine now runs at to `sink`, and at the fine one its
    control. A scenario that breaks, also while its pairs are compared, has failed, and the others go on.

    The sink feeds `suite`: where a control is planted depends on what was measured before.
    """
    noise = company.open_rung(rung, with_noise=rung == suite.base.info.ladder.upper)
    if noise is not None:
        sink.add(RecordedPair(PairRole.SELF_NOISE, noise, SHARED))
    barred: set[Site] = set()  # where the engine cannot plant, in one scenario as in the next
    for script in suite.scripts:
        name = script.scenario.name
        if name in suite.runs:
            progress.step(f"{name} at {rung}")
            try:
                _capture(company, script, suite.runs[name], rung, sink, barred)
            except Exception as error:  # noqa: BLE001 - whatever breaks in a scenario, the scenario has failed
                script.fail(f"it broke off at {rung}", error)
    company.close_rung()
    sink.release()


def _capture(company: Company, script: Script, run: Measured, rung: str, sink: PairSink, barred: set[Site]) -> None:
    name = script.scenario.name
    for pair in company.run(script, rung):
        sink.add(RecordedPair(PairRole.PAIR, pair, name))
    if rung != run.info.ladder.upper:
        return
    if run.info.perturbable:
        _measure_noise(company, script, run, rung, sink)
    reference, position = company.reference_of_control(script)
    plants = plants_on_ladder(
        run, Mode.AS_DESIGNED, random.Random(run.plan.seed), lambda place: is_zero_at(reference, place, position)
    )
    for plant in plants:
        if plant.site in barred:
            continue
        try:
            for pair in company.control(script, rung, plant):
                decode = replace(pair.decode, label=f"{name}.{PairRole.CONTROL}")
                sink.add(RecordedPair(PairRole.CONTROL, replace(pair, decode=decode), name, plant))
        except NotPlanted:
            barred.add(plant.site)
        else:
            return


def _measure_noise(company: Company, script: Script, run: Measured, rung: str, sink: PairSink) -> None:
    """Measure the noise of a scenario itself where it drifts by more than that of plain decode explains.

    What stays within the noise of plain decode needs no other: a smaller bound is the stricter one. Of the rows beyond
    it those of the first few segments are perturbed, the whole scenario with them.
    """
    mode = str(Mode.AS_DESIGNED)
    found = climb(run.table, mode, run.info.dtype, run.info.ladder, run.floors)
    names = list(dict.fromkeys(address.prompt for address in found.excess.rows.addresses(found.excess.beyond)))
    if found.evidence.valid and not names:
        return
    names = names or [segment.name for segment in script.segments]
    size: float | None = SCALES[rung].sizes[0]
    while size is not None:
        for shift in (size, -size):
            for pair in company.perturbed(script, rung, shift, names[:_PERTURBED]):
                sink.add(RecordedPair(PairRole.PERTURBED, pair, script.scenario.name, shift=shift))
        size = run.floors.wants_larger(mode)
