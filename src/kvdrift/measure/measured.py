"""One run as measured: built while an engine is captured, or from saved traces, and judged the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from kvdrift.capture.modes import Captured
from kvdrift.compare.drift import DriftTable
from kvdrift.diagnosis.coefficients import explain_directed
from kvdrift.diagnosis.diagnose import Explained, diagnose
from kvdrift.instruments.asymmetry import ErrorTable
from kvdrift.instruments.cacheaudit import SlotTable
from kvdrift.instruments.replay import ReplayTable
from kvdrift.instruments.route import Route, prove_route
from kvdrift.instruments.router import RouterTable
from kvdrift.instruments.rowwise import RowTable
from kvdrift.measure.suspects import Suspects
from kvdrift.trace.model import Array, PassPair, Trace
from kvdrift.verdict.decide import Decision, decide
from kvdrift.verdict.findings import Findings, Recorded
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.facts import EngineFacts, Plant, Prompt
from kvdrift.vocabulary.plan import CONTROL, SELF_NOISE, AuditPlan, Mode
from kvdrift.vocabulary.precision import HALF, UPPER
from kvdrift.vocabulary.sites import Site


@dataclass(slots=True)
class RunningStats:
    """Minimum, maximum and mean over visible keys of the probed attention rows, in float64."""

    n: int = 0
    total: float = 0.0
    smallest: float = float("inf")
    largest: float = float("-inf")

    def add(self, values: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
        """Take in `values` of any shape."""
        if values.size:
            self.n += values.size
            self.total += float(values.sum())
            # np.minimum, unlike min, hands a NaN on
            self.smallest = float(np.minimum(self.smallest, values.min()))
            self.largest = float(np.maximum(self.largest, values.max()))

    def merge(self, other: RunningStats) -> None:
        """Take in everything that `other` has seen."""
        self.n += other.n
        self.total += other.total
        self.smallest = float(np.minimum(self.smallest, other.smallest))
        self.largest = float(np.maximum(self.largest, other.largest))

    @property
    def mean(self) -> float | None:
        return self.total / self.n if self.n else None


def alone(trace: Trace) -> PassPair:
    """A trace that has no counterpart, in the form in which traces are saved: as a pair of itself."""
    positions = tuple(sorted({position for record in trace.rows for position in record.positions}))
    return PassPair(Mode.KV_ALIGNED, trace, trace, positions)


def rungs_of(plan: AuditPlan, info: EngineFacts) -> tuple[str, ...]:
    """Return the precisions that a run has, in the order in which they run; the control is planted at the last one.

    The fine rung comes last, also where it is the native one: its bounds and the positive control need the other.
    """
    if plan.ladder == "off":
        return (info.dtype,)
    lower, upper = info.ladder.lower, info.ladder.upper
    return (*dict.fromkeys(rung for rung in (info.dtype, lower) if rung != upper), upper)


StatKey = tuple[str, str, str, int]  # mode, pass, site, layer


@dataclass(slots=True)
class Run:
    """Everything that was measured. `rung_failures` says why a rung of the ladder could not run; `recorded` is set for
    traces that kvdrift did not capture itself."""

    plan: AuditPlan
    info: EngineFacts
    prompts: list[Prompt]
    created: str
    command: str | None = None
    table: DriftTable = field(default_factory=DriftTable)
    replay: ReplayTable = field(default_factory=ReplayTable)
    suspects: Suspects = field(default_factory=Suspects)
    routes: list[Route] = field(default_factory=list)
    attention: dict[StatKey, RunningStats] = field(default_factory=dict)
    seen_sites: dict[int | None, set[Site]] = field(default_factory=dict)
    plant: Plant | None = None
    control_mode: Mode | None = None
    layer_inputs: dict[str, dict[int, Array]] = field(default_factory=dict)  # of native prefill, by prompt
    errors: ErrorTable = field(default_factory=ErrorTable)
    routers: RouterTable = field(default_factory=RouterTable)
    slots: SlotTable = field(default_factory=SlotTable)
    row_wise: RowTable = field(default_factory=RowTable)
    rung_failures: dict[str, str] = field(default_factory=dict)
    recorded: Recorded | None = None

    def add(self, captured: Captured) -> None:
        """Compare everything recorded of one prompt at one rung; the traces are not kept."""
        for pair in captured.pairs:
            self.add_pair(pair)
        if captured.self_noise is not None:
            self.table.add(captured.self_noise, SELF_NOISE, with_hashes=False)
        if captured.inputs:
            self.layer_inputs[captured.prompt] = captured.inputs
        if captured.specification is not None:
            self.errors.compare(captured.specification)

    def add_pair(self, pair: PassPair) -> None:
        """Compare one pair of passes."""
        native = pair.prefill.rung == self.info.dtype
        rows = self.table.rows_of(self.table.add(pair, pair.mode, with_hashes=native))
        self.suspects.watch(self.table, pair, rows, self.info.dtype, self.info.ladder, self.info.roundoffs)
        self.routes.append(self.prove(pair))
        if native and pair.mode is Mode.KV_ALIGNED and self.wants_specification:
            self.errors.remember(pair)
        if native and pair.mode is Mode.KV_ALIGNED and self.recorded is None and self.info.dtype in HALF:
            self.row_wise.add(pair)
        if native and self.info.experts_per_token is not None:
            self.routers.add(pair, self.info.experts_per_token)
        elif native and pair.mode is Mode.AS_DESIGNED and self.recorded is None:
            self.slots.add(pair)
        if native:
            # Without a ladder, attention is what as_designed is judged by.
            replayed = self.modes if self.plan.ladder == "off" or self.recorded is not None else self.modes[-1:]
            if pair.mode in replayed and self.info.dtype != "float64":
                self.replay.add(pair)
            for trace in (pair.prefill, pair.decode):
                self._attention_stats(str(pair.mode), trace, pair.positions)
                for layer, site in trace.places():
                    self.seen_sites.setdefault(layer, set()).add(site)

    def add_control(self, pair: PassPair) -> None:
        """Compare the decode step with the planted fault."""
        self.control_mode = pair.mode
        self.table.add(pair, CONTROL, with_hashes=False)

    @property
    def modes(self) -> tuple[Mode, ...]:
        """The modes that were asked for and that this engine can run."""
        return tuple(m for m in self.plan.modes if m is not Mode.KV_ALIGNED or self.info.can_rewind)

    def prove(self, pair: PassPair) -> Route:
        """Return the proof that the passes of a pair took two routes."""
        return prove_route(pair)

    @property
    def failures(self) -> dict[str, str]:
        """Why a mode did not run or broke off."""
        if Mode.KV_ALIGNED in self.plan.modes and not self.info.can_rewind:
            return {str(Mode.KV_ALIGNED): f"not available: {self.info.why_no_rewind}"}
        return {}

    @property
    def probed_tokens(self) -> dict[str, tuple[int, ...]]:
        """The tokens on which the first compared values depend, by prompt."""
        return {prompt.name: prompt.tokens for prompt in self.prompts}

    @property
    def rungs(self) -> tuple[str, ...]:
        """The precisions to run at, in the order in which they run."""
        return rungs_of(self.plan, self.info)

    @property
    def wants_specification(self) -> bool:
        """Whether the errors of both passes can be told apart: a float64 rung, aligned inputs, a native dtype below."""
        return self.rungs[-1] == UPPER != self.info.dtype and Mode.KV_ALIGNED in self.modes

    @property
    def control_rung(self) -> str:
        """The precision at which the positive control is planted."""
        return self.rungs[-1]

    @property
    def findings(self) -> Findings:
        """What was measured, as far as a verdict needs it."""
        return Findings(
            table=self.table,
            routes=self.routes,
            modes=self.modes,
            native=self.info.dtype,
            rungs=self.info.ladder,
            roundoffs=self.info.roundoffs,
            prompts=[prompt.name for prompt in self.prompts],
            probed_tokens=self.probed_tokens,
            failures=self.failures,
            rung_failures=self.rung_failures,
            replay=self.replay,
            errors=self.errors if self.wants_specification else None,
            alpha=self.plan.alpha,
            seed=self.plan.seed,
            ladder=self.plan.ladder,
            control_place=None if self.plant is None else Place(self.plant.layer, self.plant.site),
            control_size=None if self.plant is None else self.plant.factor - 1.0,
            control_mode=self.control_mode,
            recorded=self.recorded,
            routers=self.routers,
            row_wise=self.row_wise,
            slots=None if self.info.experts_per_token is not None else self.slots,
        )

    def decide(self) -> Decision:
        """Judge the run."""
        return decide(self.findings)

    def diagnose(self, decision: Decision) -> Explained | None:
        """Explain the first failure of a mismatch from the values that were kept of it; None if nothing failed.

        Where a cause is smaller than rounding no single difference shows it; the directed test that found it does.
        """
        first = decision.first_failure
        if first is None:
            return None
        explained = self._explain(decision, first)
        if explained.diagnosis.cause != Cause.UNEXPLAINED or decision.kind == "semantic":
            return explained
        found = (
            explain_directed(
                first,
                native.causes,
                self.table.select(mode, self.info.dtype),
                self.info.dtype,
                self.info.roundoffs,
            )
            for mode, native in reversed(decision.natives.items())
        )
        told = next((item for item in found if item is not None), None)
        return explained if told is None else replace(explained, diagnosis=told)

    def _explain(self, decision: Decision, first: Address) -> Explained:
        rung = self.info.ladder.upper if decision.kind == "semantic" else self.info.dtype
        # Aligned inputs first: there nothing but the fault differs.
        found = (self.suspects.at(first, str(mode), rung) for mode in reversed(self.modes))
        suspect = next((item for item in found if item is not None), None)
        if suspect is None:
            text = f"the values at {first} were not kept, so no cause was tried on them"
            return Explained(Diagnosis(Cause.UNEXPLAINED, 0.0, text), ())
        try:
            explained = diagnose(suspect)
            if suspect.address == first:
                return explained
            told = f"{explained.diagnosis.text} (tried on {suspect.address}, where it shows best)"
            return replace(explained, diagnosis=replace(explained.diagnosis, text=told))
        except (ValueError, IndexError, ArithmeticError) as error:
            # The verdict stands without it.
            text = f"the diagnosis itself failed at {first}: {type(error).__name__}: {error}"
            return Explained(Diagnosis(Cause.UNEXPLAINED, 0.0, text), ())

    def _attention_stats(self, mode: str, trace: Trace, positions: Sequence[int]) -> None:
        hidden: dict[tuple[int | None, int], np.ndarray[tuple[int, ...], np.dtype[np.bool_]]] = {}
        for record in trace.rows:
            if record.site not in (Site.ATTN_SCORES, Site.ATTN_PROBS):
                continue
            for index, position in enumerate(record.positions):
                if position not in positions:
                    continue
                values = record.values[index].astype(np.float64)
                place = (record.layer, position)
                if record.site is Site.ATTN_SCORES:
                    hidden[place] = np.isneginf(values)
                visible = values[~hidden[place]] if place in hidden else values.ravel()
                key = (mode, trace.pass_name, str(record.site), -1 if record.layer is None else record.layer)
                self.attention.setdefault(key, RunningStats()).add(visible)
