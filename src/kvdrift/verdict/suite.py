"""A run and its scenarios: each scenario is judged as a run of its own, and the worst of all is the verdict."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from kvdrift.diagnosis.diagnose import Explained
from kvdrift.instruments.cacheaudit import QuantisedRows, SlotTable
from kvdrift.instruments.choice import ChoiceTable
from kvdrift.instruments.route import Route, prove_quantised_route, prove_scenario_route
from kvdrift.measure.measured import Run
from kvdrift.replay.quantisation import FORMATS
from kvdrift.scenarios.catalogue import DECODE, DECODE_FINDS
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.runner import Passes, Script, renamed
from kvdrift.trace.model import PassPair
from kvdrift.verdict.choice import weigh_choices
from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Verdict
from kvdrift.vocabulary.facts import Plant, Prompt
from kvdrift.vocabulary.plan import SELF_NOISE, Mode

SHARED = "*"  # the scenario of what all scenarios share
_ORDER = (Verdict.MISMATCH, Verdict.INCONCLUSIVE, Verdict.STRUCTURAL_DRIFT, Verdict.EXACT)

_QUANTISED = (
    "the reference reads rows that kvdrift has quantised to %s itself: the verdict is about what exceeds honest "
    "quantisation; what quantisation as such changes, against a prefill on rows as they are, is not judged"
)


@dataclass(slots=True)
class ScenarioRun(Run):
    """One scenario as measured. Its prompts are the segments that it compares; `choices` says of those whose tokens a
    generation loop chose how it chose them."""

    failure: str | None = None
    choices: dict[str, str] = field(default_factory=dict)
    chosen: ChoiceTable = field(default_factory=ChoiceTable)

    # By name: `super()` does not work in a dataclass with slots.
    def add_pair(self, pair: PassPair) -> None:
        """Compare one pair of passes, and the choices that were made from its logits."""
        Run.add_pair(self, pair)
        choice = self.choices.get(pair.decode.prompt)
        if choice and pair.decode.rung == self.info.dtype:
            self.chosen.add(pair, choice)

    def diagnose(self, decision: Decision) -> Explained | None:
        """Explain the first failure: a wrong choice explains itself."""
        for wrong in self.chosen.all_turned()[:1]:
            if wrong.is_wrong and decision.reasons == (wrong.text,):
                return Explained(Diagnosis(Cause.WRONG_CHOICE, 1.0, wrong.text), ())
        return Run.diagnose(self, decision)

    def prove(self, pair: PassPair) -> Route:
        """Return the proof that the scenario took another route than a plain prefill."""
        return (prove_quantised_route if self.slots.quantised else prove_scenario_route)(pair)

    def decide(self) -> Decision:
        """Judge the scenario and the choices made in it; what a quantised cache costs by design is not judged, and its
        reader is told."""
        decision = weigh_choices(Run.decide(self), self.chosen, str(Mode.AS_DESIGNED))
        if not self.slots.quantised:
            return decision
        names = " and ".join(dict.fromkeys(FORMATS[rows.kind].name for rows in self.slots.quantised.values()))
        return dataclasses.replace(decision, caveats=(*decision.caveats, Caveat("QUANTISED_CACHE", _QUANTISED % names)))

    @property
    def failures(self) -> dict[str, str]:
        """Why the scenario broke off; the aligned mode does not exist for it."""
        found = {str(Mode.KV_ALIGNED): "a scenario runs as designed"}
        return found if self.failure is None else {**found, str(Mode.AS_DESIGNED): self.failure}

    @property
    def probed_tokens(self) -> dict[str, tuple[int, ...]]:
        """The tokens up to the first compared one: segments that begin alike must give the same there."""
        return {segment.name: segment.prompt for segment in self.prompts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The conclusion of one scenario; `verdict` is None where it did not apply, and `reasons` say why."""

    name: str
    finds: str
    verdict: Verdict | None
    decision: Decision | None = None
    run: Run | None = None
    diagnosis: Diagnosis | None = None
    reasons: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Judged:
    """A suite with its verdict: `decision` and `run` are those of the scenario that decides, `leading`."""

    decision: Decision
    run: Run
    leading: str
    outcomes: tuple[Outcome, ...]


@dataclass(slots=True)
class Suite:
    """Plain decode, if it was asked for, and the other scenarios; `base` holds the facts that all of them share."""

    base: Run
    with_decode: bool = True
    scripts: list[Script] = field(default_factory=list)
    passes: Passes = field(default_factory=Passes)
    runs: dict[str, ScenarioRun] = field(default_factory=dict)

    def open_runs(self) -> None:
        """Make the empty run of every scenario that compares something."""
        n_runs = max(1, sum(script.runs for script in self.scripts) + self.with_decode)
        plan = dataclasses.replace(self.base.plan, mode="as_designed", alpha=self.base.plan.alpha / n_runs)
        for script in self.scripts:
            if script.runs:
                prompts = [_as_prompt(s.name, s.tokens, s.positions) for s in script.segments]
                quantised = {s.name: QuantisedRows(s.quantised, s.n_first) for s in script.segments if s.quantised}
                slots = SlotTable(quantised)
                run = ScenarioRun(plan, self.base.info, prompts, self.base.created, self.base.command, slots=slots)
                run.choices = {s.name: s.choice for s in script.segments if s.choice}
                self.runs[script.scenario.name] = run

    def add_noise(self, pair: PassPair) -> None:
        """Add the self-noise that all scenarios share."""
        for run in self.runs.values():
            run.table.add(renamed(pair), SELF_NOISE, with_hashes=False)

    def judge(self) -> Judged:
        """Judge every scenario, then the whole: the worst verdict is that of the suite, and nothing applicable is
        INCONCLUSIVE."""
        outcomes = tuple(self._outcomes())
        verdicts = [outcome.verdict for outcome in outcomes if outcome.verdict is not None]
        worst = next((verdict for verdict in _ORDER if verdict in verdicts), Verdict.INCONCLUSIVE)
        ran = [outcome for outcome in outcomes if outcome.decision is not None]
        leading = next((outcome for outcome in ran if outcome.verdict is worst), next(iter(ran), None))
        if leading is None or leading.decision is None or leading.run is None:
            empty = dataclasses.replace(self.base, table=type(self.base.table)())
            leading = Outcome(name="none", finds="", verdict=worst, decision=empty.decide(), run=empty)
        assert leading.decision is not None
        assert leading.run is not None
        reasons = leading.decision.reasons
        if worst is Verdict.INCONCLUSIVE:
            reasons = tuple(f"{o.name}: {why}" for o in outcomes if o.verdict is worst for why in o.reasons)
            if not verdicts:
                reasons = ("no scenario is applicable", *(f"{o.name}: {why}" for o in outcomes for why in o.reasons))
            if len(outcomes) == 1 and self.with_decode:
                reasons = leading.decision.reasons
        decision = dataclasses.replace(leading.decision, verdict=worst, reasons=reasons)
        return Judged(decision, leading.run, leading.name, outcomes)

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
                yield _judged(name, finds, run)


def _judged(name: str, finds: str, run: Run) -> Outcome:
    decision = run.decide()
    explained = run.diagnose(decision)
    return Outcome(
        name=name,
        finds=finds,
        verdict=decision.verdict,
        decision=decision,
        run=run,
        diagnosis=None if explained is None else explained.diagnosis,
        reasons=decision.reasons,
    )


def _as_prompt(name: str, tokens: tuple[int, ...], positions: Sequence[int]) -> Prompt:
    first = min(positions) + 1
    return Prompt(name, tokens[:first], tokens[first:])


__all__ = ["SHARED", "Judged", "Outcome", "Plant", "Scenario", "ScenarioRun", "Suite"]
