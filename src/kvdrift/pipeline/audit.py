"""The audit: captures every prompt at every rung, judges, and leaves a run directory. Only composes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import Encode, default_prompts, prompts_of_lengths, tokenize
from kvdrift.capture.rungs import DecodeCapture, missing_rung
from kvdrift.capture.scenarios import capture_scenarios
from kvdrift.engines.base import CanBeOpened, LiveEngine
from kvdrift.errors import UsageError, VerdictError
from kvdrift.measure.measured import Measured
from kvdrift.report.html import render_html
from kvdrift.report.markdown import render_markdown
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.scenarios import build_suite_view
from kvdrift.report.view import to_strict_json
from kvdrift.scenarios.catalogue import choose_scenarios
from kvdrift.scenarios.model import Scenario
from kvdrift.scenarios.runner import Company
from kvdrift.trace.recording import Fan, PairSink
from kvdrift.trace.store import TraceStore
from kvdrift.verdict.charts import build_charts
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.suite import JudgedSuite, Suite, describe
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import Caveat, Diagnosis, Evidence, Kind, Verdict
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import AuditPlan, LadderChoice, ModeChoice, Prompts, sort_lengths
from kvdrift.vocabulary.progress import Progress, Silent
from kvdrift.vocabulary.schedule import rungs_of


@dataclass(frozen=True, slots=True, repr=False)
class Audit:
    """The result of an audit. `path` is the run directory, None if none was written."""

    suite: JudgedSuite
    view: dict[str, Any]
    path: Path | None

    @property
    def decision(self) -> Decision:
        return self.suite.judged.decision

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

    @property
    def kind(self) -> Kind | None:
        return self.decision.kind

    @property
    def first_failure(self) -> Address | None:
        return self.decision.first_failure

    @property
    def diagnosis(self) -> Diagnosis | None:
        """The cause that reproduces a mismatch; None without one, cause "unexplained" if none of the catalogue does."""
        return self.suite.judged.diagnosis

    @property
    def evidence(self) -> tuple[Evidence, ...]:
        return self.decision.evidence

    @property
    def caveats(self) -> tuple[Caveat, ...]:
        return self.decision.caveats

    @property
    def exit_code(self) -> int:
        """0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 6 INCONCLUSIVE."""
        return self.verdict.exit_code

    def __repr__(self) -> str:
        """One line: the verdict, what it is about, the first failure and the cause."""
        kind = f", {self.kind}" if self.kind else ""
        cause = "" if self.diagnosis is None else f", cause {self.diagnosis.cause}"
        first = "" if self.first_failure is None else f" at {self.first_failure}"
        return f"<Audit: {self.verdict}{kind}{first}{cause}; {self.view.get('about', '')}>"

    def check(self, *, allow_inconclusive: bool = False) -> Audit:
        """Return the audit if it is a pass.

        Args:
            allow_inconclusive: whether an audit that could not tell may go through as well.

        Raises:
            VerdictError: MISMATCH, with address and cause, or INCONCLUSIVE, with the reasons.
        """
        if self.exit_code == 0 or (allow_inconclusive and self.verdict is Verdict.INCONCLUSIVE):
            return self
        cause = "" if self.diagnosis is None else f" Cause: {self.diagnosis.cause}, {self.diagnosis.text}."
        where = "" if self.path is None else f" Report: {self.path / 'report.md'}."
        kind = f" ({self.kind})" if self.kind else ""
        conclusion = self.view["hypotheses"]["conclusion"]
        raise VerdictError(f"{self.verdict}{kind}: {conclusion}{cause}{where}", self.exit_code)

    def to_json(self) -> str:
        """Return the report as strict JSON; non-finite figures are the strings "nan", "inf" and "-inf"."""
        return to_strict_json(self.view)

    def to_markdown(self) -> str:
        """Return the report for people."""
        return render_markdown(self.view)

    def to_html(self) -> str:
        """Return the report with its pictures as one page of HTML, which fetches nothing."""
        return render_html(self.view, build_charts(self.suite.judged))


def audit_engine(
    engine: LiveEngine,
    plan: AuditPlan,
    prompts: Prompts | None,
    encode: Encode | None,
    *,
    out: Path | None,
    command: str | None = None,
    progress: Progress | None = None,
    scenarios: str | Sequence[str | Scenario] | None = None,
) -> Audit:
    """Audit an open engine.

    Raises:
        UsageError: a prompt does not fit the model, or `out` cannot be written.
        CaptureError: the engine broke off before anything could be compared.
    """
    progress = progress or Silent()
    info = engine.info
    with_decode, others = choose_scenarios(scenarios)
    if plan.lengths is not None and (others or not with_decode):
        raise UsageError(
            "--lengths sweeps plain decode, and a scenario runs on one prompt; leave out --scenario (scenarios=...) or "
            "--lengths (lengths=...)"
        )
    ids = _token_ids(plan, info, prompts, encode)
    if plan.ladder == "layer" and info.engine != "hf":
        raise UsageError(
            f"--ladder layer streams the weights of a torch model, and {info.engine} has none; use --ladder model or "
            "off (ladder=...)"
        )
    if plan.ladder == "off" and others:
        raise UsageError("scenarios are judged on the precision ladder; leave out --scenario, or --ladder off")
    with RunDirectory(out) as directory:
        rungs = rungs_of(plan, info)
        progress.start(len(ids) * (1 + with_decode * len(rungs)) + len(others) * len(rungs) + 2)
        prompts_fixed = _continued(engine, ids, plan, progress)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        measured = Measured(plan, info, prompts_fixed, created=created, command=command)
        company = Company(engine, others, prompts_fixed)
        suite = Suite(measured, with_decode, company.scripts, company.passes)
        store = TraceStore(directory.traces) if directory.traces is not None and plan.keep_traces else None
        capture_all(engine, suite, company, store, progress)
        progress.step("judging")
        judged = suite.judge()
        audit = Audit(judged, build_suite_view(suite, judged), directory.target)
        if store is not None:
            store.finish(describe(suite))
        if directory.work is not None:
            judged.judged.measured.table.write(directory.work)
            (directory.work / "report.json").write_text(audit.to_json(), encoding="utf-8")
            (directory.work / "report.md").write_text(audit.to_markdown(), encoding="utf-8")
            (directory.work / "report.html").write_text(audit.to_html(), encoding="utf-8")
            directory.commit()
    return audit


def capture_all(engine: LiveEngine, suite: Suite, company: Company, store: PairSink | None, progress: Progress) -> None:
    """Capture plain decode and all scenarios at every precision, into the store and the suite."""
    sink = Fan([suite] if store is None else [store, suite])
    decode = DecodeCapture(engine, suite.base, sink)
    for rung in suite.base.rungs:
        if suite.with_decode:
            decode.run(rung, progress)
        else:
            decode.run_unobserved(rung, progress)
        if suite.runs:
            with missing_rung(suite.base, rung), engine.at(rung):
                capture_scenarios(suite, company, rung, sink, progress)


def _continued(
    engine: LiveEngine, ids: Mapping[str, tuple[int, ...]], plan: AuditPlan, progress: Progress
) -> list[Prompt]:
    """Return the prompts with the engine's own continuations."""
    prompts = []
    for name, tokens in ids.items():
        progress.step(f"{name}: the continuation")
        prompts.append(Prompt(name, tokens, continue_greedily(engine, tokens, plan.span)))
    return prompts


def _token_ids(
    plan: AuditPlan, info: EngineFacts, prompts: Prompts | None, encode: Encode | None
) -> dict[str, tuple[int, ...]]:
    limits: dict[str, Any] = {"vocab_size": info.vocab_size, "max_positions": info.max_positions, "span": plan.span}
    if plan.lengths is not None:
        return prompts_of_lengths(plan.lengths, prompts, encode, **limits)
    return tokenize(prompts if prompts is not None else default_prompts(encode, info.vocab_size), encode, **limits)


@contextmanager
def _open(model: Any, plan: AuditPlan, cache: Any, inputs: Mapping[str, Any] | None) -> Iterator[tuple[Any, Any]]:
    """Open a model of transformers or a caller's own engine, and yield it with its own way from text to tokens.

    Raises:
        UsageError: a cache or inputs were given to an engine that has its own.
    """
    if isinstance(model, CanBeOpened):
        if inputs or cache != "dynamic":
            raise UsageError("cache= and inputs= are for models of transformers; an engine of your own has its own")
        with model.opened(plan) as opened:
            yield opened.engine, opened.encode
        return
    from kvdrift.engines.hf.engine import HFEngine

    by_layer = plan.ladder == "layer"
    with HFEngine(model, cache=cache, layers=plan.layers, by_layer=by_layer, inputs=inputs) as engine:
        yield engine, None


def _require_plain_decode(scenarios: str | Sequence[str | Scenario] | None, lengths: Sequence[int] | None) -> None:
    """Refuse inputs beside the tokens on routes that make texts of their own.

    Raises:
        UsageError: scenarios or lengths were asked for.
    """
    if lengths is not None or choose_scenarios(scenarios) != (True, ()):
        raise UsageError(
            "inputs= goes with the prompts as they are, and scenarios and lengths= make texts of their own; leave out "
            "scenarios and lengths, or inputs"
        )


def audit(
    model: Any,
    tokenizer: Any = None,
    *,
    prompts: Prompts | None = None,
    mode: ModeChoice = "both",
    span: int = 4,
    alpha: float = 1e-3,
    out: str | Path | None = None,
    layers: tuple[int, ...] | None = None,
    cache: str | Callable[[], Any] = "dynamic",
    ladder: LadderChoice = "model",
    seed: int = 0,
    scenarios: str | Sequence[str | Scenario] | None = None,
    lengths: Iterable[int] | None = None,
    inputs: Mapping[str, Any] | None = None,
) -> Audit:
    """Audit a torch `PreTrainedModel`: does its cached decode compute what its prefill computes?

    The model is run as it is, with whatever modules or attention functions it has been given. Hooks, dtypes and
    registrations are restored afterwards, and its parameters are the same bits as before.

    Args:
        model: a decoder-only language model of transformers, on any device; or an engine of your own (TorchEngine).
        tokenizer: needed only for prompts given as text.
        prompts: text or token ids by prompt id; default: three prompts of 1, 16 and 32 tokens or so.
        mode: "as_designed", "kv_aligned" or "both".
        span: how many tokens after each prompt are probed.
        alpha: chance of a false alarm that the whole audit may have.
        out: directory for the report and traces; None writes nothing.
        layers: layers to record, None for all.
        cache: "dynamic", "static", or a function that returns a new empty cache of your own each time it is called
            (`cache=lambda: MyCache()`).
        ladder: "model" holds the whole model in float64 for the upper rung, "layer" one layer at a time,
            "off" leaves these rungs out: then the native instruments decide alone.
        seed: picks where the positive control is planted.
        scenarios: routes to run, by name or as `kvdrift.Scenario`; "all" for all that apply; None for plain decode.
        lengths: prompt lengths in tokens, such as [64, 65, 128]: the longest prompt is cut or repeated to each of them,
            and the report names the length or position at which decode begins to behave differently.
        inputs: what the model takes beside the tokens, such as pixel_values: passed to the first call of each sequence.
            All prompts need the places for them; plain decode alone is audited.

    Raises:
        UsageError: an argument or a prompt does not fit the model.
        EngineUnavailable: the model has no cached decode step to audit.
        CaptureError: the model failed, or its weights are not finite.
    """
    from kvdrift.engines.encode import encoder

    sweep = None if lengths is None else sort_lengths(lengths)
    plan = AuditPlan(mode=mode, span=span, layers=layers, alpha=alpha, ladder=ladder, seed=seed, lengths=sweep)
    target = None if out is None else Path(out)
    if inputs:
        _require_plain_decode(scenarios, sweep)
    with _open(model, plan, cache, inputs) as (engine, own_encode):
        encode = encoder(tokenizer) or own_encode
        if inputs:
            engine.beside.require_places(_token_ids(plan, engine.info, prompts, encode))
        return audit_engine(engine, plan, prompts, encode, out=target, scenarios=scenarios)
