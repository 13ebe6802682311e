"""Captures the scenarios of a suite at one precision after the other."""

from __future__ import annotations

import random

from kvdrift.engines.base import Engine
from kvdrift.errors import CaptureError, KvdriftError
from kvdrift.instruments.control import SITES, planted_size
from kvdrift.instruments.ladder import climb
from kvdrift.scenarios.runner import Company, Script, renamed
from kvdrift.trace.store import TraceStore
from kvdrift.verdict.suite import SHARED, ScenarioRun, Suite
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.facts import Plant
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.progress import Progress


def capture_scenarios(
    engine: Engine, suite: Suite, company: Company, rung: str, store: TraceStore | None, progress: Progress
) -> None:
    """Capture every scenario at one rung. A scenario that breaks has failed, and the others go on; a rung that cannot
    run at all is a missing rung, except the native one."""
    if not suite.runs:
        return
    try:
        with engine.at(rung):
            noise = company.open_rung(rung, with_noise=rung == suite.base.info.ladder.upper)
            if noise is not None:
                suite.add_noise(noise)
                if store is not None:
                    store.add(noise, "self_noise", SHARED)
            for script in suite.scripts:
                name = script.scenario.name
                if name in suite.runs:
                    progress.step(f"{name} at {rung}")
                    _capture(company, script, suite.runs[name], rung, store)
            company.close_rung()
            if store is not None:
                store.forget()
    except (CaptureError, RuntimeError, MemoryError) as error:
        if rung == suite.base.info.dtype:
            raise
        line = next(iter(str(error).strip().splitlines()), type(error).__name__)
        suite.base.rung_failures.setdefault(rung, line)
    except KvdriftError:
        raise
    finally:
        suite.passes = company.passes


def _capture(company: Company, script: Script, run: ScenarioRun, rung: str, store: TraceStore | None) -> None:
    name = script.scenario.name
    try:
        for pair in company.run(script, rung):
            if store is not None:
                store.add(pair, "pair", name)
            run.add_pair(renamed(pair))
        if rung != run.info.ladder.upper:
            return
        run.plant = _choose(run)
        if run.plant is None:
            return
        for pair in company.control(script, rung, run.plant):
            pair.decode.label = f"{name}.control"
            if store is not None:
                store.add(pair, "control", name)
            run.add_control(renamed(pair))
    except Exception as error:  # noqa: BLE001 - whatever breaks in a scenario, the scenario has failed
        script.fail(f"it broke off at {rung}", error)


def _choose(run: ScenarioRun) -> Plant | None:
    """The fault of the positive control: just above what the ladder of this scenario allows at a place of its own."""
    bounds = climb(run.table, str(Mode.AS_DESIGNED), run.info.dtype, run.info.ladder).bounds
    site = next((site for site in SITES if any(site is place.site for place in bounds)), None)
    if site is None:
        return None
    layers = sorted(place.layer for place in bounds if place.site is site and place.layer is not None)
    layer = random.Random(run.plan.seed).choice(layers)
    return Plant(layer, site, 1.0 + planted_size(bounds[Place(layer, site)]))
