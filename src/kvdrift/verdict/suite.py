"""All routes of a run: each is judged by itself, and the worst verdict is that of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import msgspec

from kvdrift.errors import UsageError
from kvdrift.instruments.asymmetry import Asymmetry
from kvdrift.instruments.base import QuantisedRows
from kvdrift.instruments.route import prove_honest_route, prove_scenario_route
from kvdrift.instruments.unobserved import Unobserved
from kvdrift.measure.measured import Measured
from kvdrift.pairing.drift import DriftTable
from kvdrift.pairing.floors import FloorTable
from kvdrift.scenarios.catalogue import DECODE, DECODE_FINDS, SCENARIOS
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.runner import Script, renamed
from kvdrift.trace.manifest import FORMAT_VERSION, Manifest, ScenarioEntry
from kvdrift.trace.recording import SHARED, RecordedPair
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.judge import Judged, judge
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.facts import Passes, Prompt, Segment

_ORDER = (Verdict.MISMATCH, Verdict.INCONCLUSIVE, Verdict.STRUCTURAL_DRIFT, Verdict.EXACT)


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The conclusion of one route; `judged` is None where nothing was compared, and `reasons` say why.

    `verdict` is None for a scenario that did not apply.
    """

    name: str
    finds: str
    verdict: Verdict | None
    judged: Judged | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class JudgedSuite:
    """A suite with its verdict: `judged` is the route that decides, `leading` its name, and `outcomes` are all routes.

    `judged.decision` has the verdict and the reasons of the whole.
    """

    judged: Judged
    leading: str
    outcomes: tuple[Outcome, ...]


@dataclass(slots=True)
class Suite:
    """Plain decode, if it was asked for, and the scenarios; `base` holds the facts that all of them share."""

    base: Measured
    with_decode: bool = True
    scripts: list[Script] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)
    runs: dict[str, Measured] = field(default_factory=dict)
    _last: str = field(default="", repr=False)

    def __post_init__(self) -> None:
        """Open a route for every scenario that compares something. All routes share alpha."""
        base = self.base
        n_runs = max(1, sum(script.runs for script in self.scripts) + self.with_decode)
        plan = msgspec.structs.replace(base.plan, mode="as_designed", alpha=base.plan.alpha / n_runs)
        for script in self.scripts:
            if script.runs:
                is_honest = any(s.quantised or s.dropped for s in script.segments)
                quantised = {s.name: QuantisedRows(s.quantised, s.n_first) for s in script.segments if s.quantised}
                self.runs[script.scenario.name] = Measured(
                    plan,
                    base.info,
                    [_as_prompt(segment) for segment in script.segments],
                    base.created,
                    base.command,
                    scenario=script.scenario.name,
                    choices={s.name: s.choice for s in script.segments if s.choice},
                    prove=prove_honest_route if is_honest else prove_scenario_route,
                    quantised=quantised,
                    floors=FloorTable(shared=base.floors, keeps_pairs=True),
                )

    def add(self, item: RecordedPair) -> None:
        """Take in a pair of any route.

        Raises:
            AlignmentError: the passes are of different runs.
        """
        name = item.scenario
        if name is None:
            self.base.add(item)
            return
        if name not in (self._last, SHARED):
            self.release()
            self._last = name
        item = replace(item, pair=renamed(item.pair))
        for run in self.runs.values() if name == SHARED else [self.runs[name]]:
            run.add(item)

    @property
    def not_run(self) -> tuple[str, ...]:
        """The scenarios that come with kvdrift and were not asked for; none of those of files that others wrote."""
        asked = {script.scenario.name for script in self.scripts}
        return () if self.base.foreign is not None else tuple(s.name for s in SCENARIOS if s.name not in asked)

    def release(self) -> None:
        """Let go of the pairs whose noise might have been measured: another scenario begins, or another rung."""
        for run in self.runs.values():
            run.floors.release()

    def judge(self) -> JudgedSuite:
        """Judge every route, then the whole: the worst verdict is that of the suite, and nothing applicable is
        INCONCLUSIVE."""
        outcomes = tuple(self._outcomes())
        verdicts = [outcome.verdict for outcome in outcomes if outcome.verdict is not None]
        worst = next((verdict for verdict in _ORDER if verdict in verdicts), Verdict.INCONCLUSIVE)
        ran = [outcome for outcome in outcomes if outcome.judged is not None]
        leading = next((outcome for outcome in ran if outcome.verdict is worst), next(iter(ran), None))
        if leading is None or leading.judged is None:
            empty = replace(self.base, table=DriftTable())
            judged, name = judge(empty), "none"
        else:
            judged, name = leading.judged, leading.name
        decision = replace(judged.decision, verdict=worst, reasons=self._reasons(judged.decision, worst, outcomes))
        return JudgedSuite(replace(judged, decision=decision), name, outcomes)

    def _reasons(self, leading: Decision, worst: Verdict, outcomes: tuple[Outcome, ...]) -> tuple[str, ...]:
        """The reasons of the whole: those of the leading route, or of every route that could not tell."""
        if worst is not Verdict.INCONCLUSIVE or (len(outcomes) == 1 and self.with_decode):
            return leading.reasons
        if all(outcome.verdict is None for outcome in outcomes):
            return ("no scenario is applicable", *(f"{o.name}: {why}" for o in outcomes for why in o.reasons))
        return tuple(f"{o.name}: {why}" for o in outcomes if o.verdict is worst for why in o.reasons)

    def _outcomes(self) -> Iterator[Outcome]:
        if self.with_decode:
            yield _judged(DECODE, DECODE_FINDS, self.base)
        for script in self.scripts:
            name, finds = script.scenario.name, script.scenario.finds
            run = self.runs.get(name)
            if script.not_applicable is not None:
                yield Outcome(name=name, finds=finds, verdict=None, reasons=(script.not_applicable,))
            elif run is None:
                why = script.failure or "it was not run"
                yield Outcome(name=name, finds=finds, verdict=Verdict.INCONCLUSIVE, reasons=(why,))
            else:
                run.failure = script.failure
                run.rung_failures = self.base.rung_failures
                if not self.with_decode:  # else plain decode is judged by it
                    run.instrument(Unobserved).take_over(self.base.instrument(Unobserved))
                yield _judged(name, finds, run)


def _judged(name: str, finds: str, run: Measured) -> Outcome:
    judged = judge(run)
    return Outcome(name=name, finds=finds, verdict=judged.verdict, judged=judged, reasons=judged.decision.reasons)


def _as_prompt(segment: Segment) -> Prompt:
    first = min(segment.positions) + 1
    return Prompt(segment.name, segment.tokens[:first], segment.tokens[first:])


# -------------------------------------------------------------------------------------------------- as traces say it


def describe(suite: Suite) -> Manifest:
    """Return the manifest of a suite; the store fills in traces and pairs."""
    base = suite.base
    return Manifest(
        format_version=FORMAT_VERSION,
        created=base.created,
        command=base.command,
        engine=base.info,
        plan=base.plan,
        prompts=list(base.prompts),
        plant=base.plant,
        failures=dict(base.rung_failures),
        traces=[],
        pairs=[],
        scenarios=[_entry(script, suite.runs.get(script.scenario.name)) for script in suite.scripts],
        has_decode=suite.with_decode,
        passes=suite.passes,
        plants=base.plants[1:],
        specification=bool(base.instrument(Asymmetry).table.units),
        unobserved=base.instrument(Unobserved).rungs,
    )


def _entry(script: Script, run: Measured | None) -> ScenarioEntry:
    return ScenarioEntry(
        name=script.scenario.name,
        finds=script.scenario.finds,
        segments=tuple(script.segments),
        not_applicable=script.not_applicable,
        failure=script.failure,
        plant=None if run is None else run.plant,
    )


def script_of(entry: ScenarioEntry) -> Script:
    """Return the script of a scenario that was read from traces; it has no steps to run."""
    scenario = Scenario(entry.name, entry.finds, _cannot_run)
    return Script(scenario, list(entry.segments), entry.not_applicable, entry.failure)


def _cannot_run(stage: object) -> None:
    raise UsageError("a scenario that was read from traces has no steps to run")
