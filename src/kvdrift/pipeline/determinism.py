"""Runs one text again and again, and says whether the engine is deterministic and in the modes that it claims."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import Encode, default_prompts, tokenize
from kvdrift.capture.repeats import BATCH_SIZES, Rerun, rerun, rerun_in_batches, run_alone
from kvdrift.engines.base import LiveEngine, Routes
from kvdrift.errors import CaptureError, KvdriftError, NotApplicable, UsageError
from kvdrift.report.view import SCHEMA_VERSION, to_strict_json
from kvdrift.verdict.claims import Answered, Claim, answer
from kvdrift.verdict.determinism import Changed, Group, judge_group, look_at, midpoint
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import Prompts
from kvdrift.vocabulary.progress import Progress, Silent

_STEPS = 3  # tokens decoded behind the prompt, one by one


@dataclass(frozen=True, slots=True)
class Determinism:
    """What was found: of runs, of batches, and of what was claimed."""

    info: EngineFacts
    n_runs: int
    groups: tuple[Group, ...]
    answers: tuple[Answered, ...]

    @property
    def exit_code(self) -> int:
        """1 if anything is different or a claim is not in effect, 6 if something cannot be told, else 0: the same bits,
        or jitter of rounding."""
        states = {group.state for group in self.groups}
        answers = {item.answer for item in self.answers}
        if "different" in states or "not in effect" in answers:
            return 1
        return 6 if "unclear" in states or "cannot tell" in answers else 0

    def to_json(self) -> str:
        """Return the result as strict JSON; non-finite figures are the strings "nan", "inf" and "-inf"."""
        return to_strict_json(
            {
                "schema_version": SCHEMA_VERSION,
                "model": self.info.model,
                "engine": self.info.engine,
                "dtype": self.info.dtype,
                "n_runs": self.n_runs,
                "exit_code": self.exit_code,
                "groups": [_group(group) for group in self.groups],
                "claims": [{"claim": str(item.claim), "answer": item.answer, "why": item.why} for item in self.answers],
            }
        )

    def lines(self) -> list[str]:
        """Return the result for people, a fact a line."""
        claims = [f"{item.claim}: {item.answer}, {item.why}" for item in self.answers]
        return [f"{self.info.model} at {self.info.dtype}", *(group.text for group in self.groups), *claims]


def _group(group: Group) -> dict[str, Any]:
    return {
        "name": group.name,
        "n": group.n,
        "state": group.state,
        "size": group.size,
        "size_at_finest": group.fine,
        "why": group.why,
        "text": group.text,
        "changed": [
            {
                "where": item.where,
                "n_pairs": item.n_pairs,
                "n_differ": item.n_differ,
                "size": item.size,
                "ulp": item.ulp,
                "layer": None if item.first is None else item.first.layer,
                "site": None if item.first is None else str(item.first.site),
                "position": None if item.first is None else item.first.position,
            }
            for item in group.changed
        ],
    }


def examine(
    engine: LiveEngine,
    prompts: Prompts | None,
    encode: Encode | None,
    *,
    n_runs: int = 10,
    claims: Sequence[Claim] = (),
    progress: Progress | None = None,
) -> Determinism:
    """Run the longest prompt `n_runs` times, then in batches, and answer what is claimed.

    Raises:
        UsageError: fewer than two runs, or a prompt does not fit the model.
        CaptureError: the engine broke off.
    """
    if n_runs < 2:
        raise UsageError(f"--runs {n_runs} compares nothing; give at least 2")
    progress, info = progress or Silent(), engine.info
    limits: dict[str, Any] = {"vocab_size": info.vocab_size, "max_positions": info.max_positions, "span": _STEPS}
    ids = tokenize(prompts if prompts is not None else default_prompts(encode, info.vocab_size), encode, **limits)
    name, tokens = max(ids.items(), key=lambda item: len(item[1]))
    progress.start(2 + len(BATCH_SIZES) + len(claims))
    progress.step(f"{name}: the continuation")
    prompt = Prompt(name, tokens, continue_greedily(engine, tokens, _STEPS))
    progress.step(f"{n_runs} runs at {info.dtype}")
    groups = [*_judged(engine, lambda rung: rerun(engine, prompt, n_runs, rung), progress)]
    groups += _batches(engine, prompt, progress)
    answers = []
    if claims:
        progress.step("what is claimed")
        everywhere = tuple(range(len(prompt.tokens)))
        first, again = (run_alone(engine, prompt.tokens, _STEPS, info.dtype, everywhere) for _ in range(2))
        answers = [answer(claim, groups, first, again, _STEPS) for claim in claims]
    return Determinism(info, n_runs, tuple(groups), tuple(answers))


def _batches(engine: LiveEngine, prompt: Prompt, progress: Progress) -> list[Group]:
    routes: Routes | None = getattr(engine, "routes", None)
    why = "this engine runs one row at a time" if routes is None else routes.why_not("batch")
    if routes is None or why is not None:
        return [Group(name="batches", n=0, state="unclear", changed=(), why=why)]
    found = routes
    progress.step(f"batches of {', '.join(map(str, BATCH_SIZES))}")
    return _judged(engine, lambda rung: rerun_in_batches(engine, found, prompt, rung), progress)


def _judged(engine: LiveEngine, run: Callable[[str], Iterable[Rerun]], progress: Progress) -> list[Group]:
    """Judge runs by group, at the finest rung as well where any of them differs."""
    native, fine_rung = engine.info.dtype, engine.info.ladder.upper
    seen = _seen(run(native))
    if not any(item.n_differ for items in seen.values() for item in items):
        return [judge_group(name, items, None, engine.info, None) for name, items in seen.items()]
    fine: dict[str, list[Changed]] = {}
    why = None
    if fine_rung == native:
        why = f"{native} has no finer precision, at which rounding would shrink"
    else:
        progress.say(f"the same at {fine_rung}")
        try:
            with engine.at(fine_rung):
                fine = _seen(run(fine_rung), midpoint(engine.info))
        except (KvdriftError, NotApplicable, RuntimeError, MemoryError) as error:
            why = f"it could not be run at {fine_rung}, where rounding would shrink: {error}"
    return [judge_group(name, items, fine.get(name), engine.info, why) for name, items in seen.items()]


def _seen(runs: Iterable[Rerun], bound: float = 0.0) -> dict[str, list[Changed]]:
    found: dict[str, list[Changed]] = {}
    for item in runs:
        found.setdefault(item.group, []).append(look_at(item.where, item.pair, bound))
    if not found:
        raise CaptureError("nothing was run twice")
    return found
