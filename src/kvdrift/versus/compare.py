"""The comparison of two engines or two directories of traces: record or read, judge, and leave a run directory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import Encode, default_prompts, tokenize
from kvdrift.engines.base import CanBeOpened, OpenEngine
from kvdrift.engines.open import find_engine, require_place
from kvdrift.errors import AlignmentError, UsageError
from kvdrift.report.comparison import Comparison
from kvdrift.report.markdown import MEANING_OF_ENGINES
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.versus_page import render_versus_html
from kvdrift.versus.judge import judge
from kvdrift.versus.outcome import VersusDecision
from kvdrift.versus.record import Side, record_side
from kvdrift.versus.view import build_view
from kvdrift.vocabulary.facts import EngineFacts, Prompt
from kvdrift.vocabulary.plan import AuditPlan, Prompts
from kvdrift.vocabulary.progress import Progress, Silent

# In which order a precision is preferred for both.
_FINEST = ("float64", "float32")


class EngineComparison(Comparison[VersusDecision]):
    """The result of two engines, or of two directories of traces."""

    __slots__ = ()

    @property
    def guilty(self) -> str | None:
        """The side that is off, `A` or `B`; None if both are consistent, or both are off."""
        return self.decision.guilty

    def to_markdown(self) -> str:
        """Return the report for people."""
        return self.rendered("kvdrift.versus", "versus.md.jinja", MEANING_OF_ENGINES)

    def to_html(self) -> str:
        """Return the report as one page of HTML that fetches nothing."""
        return render_versus_html(self.view)

    def screen(self) -> list[str]:
        """Return the lines that the command prints above the place of the report."""
        view = self.view
        lines = [f"{view['verdict']}: {view['conclusion']}", f"  about: {view['about']}"]
        lines += [f"  {item['text']}" for item in view["partings"]]
        if view["native"] is not None:
            lines.append(f"  logits at the native precisions differ by {view['native']:.2g}, relative")
        lines += [f"  without a counterpart: {', '.join(view['unmatched'])}"] if view["unmatched"] else []
        return lines + [f"  {item['code']}: {item['text']}" for item in view["caveats"]]


def compare_engines(
    a: Any,
    b: Any,
    *,
    prompts: Prompts | None = None,
    span: int = 4,
    out: Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> EngineComparison:
    """Compare two engines: names of models as `kvdrift audit` takes them, models of transformers, engines of a caller's
    own (`TorchEngine`, `MLXModel`), or open engines.

    A goes first; its own most likely tokens are what both are fed.

    Raises:
        UsageError: the vocabularies, the tokens of a prompt or the precisions of both have nothing in common.
        AlignmentError: layers or widths differ.
        EngineUnavailable, CaptureError: an engine cannot be had, or broke off.
    """
    told = progress or Silent()
    with RunDirectory(out) as directory:
        with opened(b, told) as second:
            facts_b, encode_b = second.engine.info, second.encode
            ids_b = None if encode_b is None or prompts is None else _ids_of(prompts, encode_b, facts_b, span)
            rungs_b = _rungs(facts_b)
            with opened(a, told) as first:
                facts_a = first.engine.info
                _check_vocabulary(facts_a, facts_b)
                rung = next((r for r in _FINEST if r in _rungs(facts_a) and r in rungs_b), None)
                if rung is None:
                    raise UsageError(
                        f"A can run at {_words_of(facts_a)} and B at {_words_of(facts_b)}, and noise is measured at "
                        "one precision for both; compare engines that share float32"
                    )
                given = prompts if prompts is not None else default_prompts(first.encode, facts_a.vocab_size)
                ids = _ids_of(given, first.encode, facts_a, span)
                _check_tokens(ids, ids_b)
                fixed = [
                    Prompt(name, tokens, continue_greedily(first.engine, tokens, span)) for name, tokens in ids.items()
                ]
                side_a = record_side("A", first.engine, fixed, rung, told.say)
            side_b = record_side("B", second.engine, fixed, rung, told.say)
        return finish(side_a, side_b, directory, command)


def finish(a: Side, b: Side, directory: RunDirectory, command: str | None) -> EngineComparison:
    """Judge two recorded sides, and leave the report if it is asked for."""
    decision = judge(a, b)
    result = EngineComparison(decision, build_view(decision, a, b, command), directory.target)
    result.leave(directory)
    return result


@contextmanager
def opened(target: Any, progress: Progress, plan: AuditPlan | None = None) -> Iterator[OpenEngine]:
    """Open what `compare_engines` takes as an engine while the context is open."""
    plan = plan or AuditPlan()
    if isinstance(target, OpenEngine):
        yield target
    elif isinstance(target, str | Path):
        kind, place = find_engine(str(target))
        require_place(place)
        with kind.open(place, plan, progress, {}) as engine:
            yield engine
    elif isinstance(target, CanBeOpened):
        with target.opened(plan) as engine:
            yield engine
    elif hasattr(target, "new_sequence"):
        yield OpenEngine(target, None)
    else:
        from kvdrift.engines.hf.engine import HFEngine

        with HFEngine(target, layers=plan.layers) as of_torch:
            yield OpenEngine(of_torch, None)


def _rungs(facts: EngineFacts) -> tuple[str, ...]:
    """The precisions at which an engine can be compared; its own alone for one that says it cannot cast."""
    if "NO_CAST" in facts.caveats:
        return (facts.dtype,) if facts.dtype in _FINEST else ()
    found = [facts.ladder.upper, facts.ladder.lower]
    if facts.ladder.upper == "float64":
        found.append("float32")
    return tuple(dict.fromkeys(rung for rung in found if rung in _FINEST))


def _words_of(facts: EngineFacts) -> str:
    return ", ".join(_rungs(facts)) or f"{facts.dtype} alone"


def _ids_of(prompts: Prompts, encode: Encode | None, facts: EngineFacts, span: int) -> dict[str, tuple[int, ...]]:
    return tokenize(prompts, encode, vocab_size=facts.vocab_size, max_positions=facts.max_positions, span=span)


def _check_vocabulary(a: EngineFacts, b: EngineFacts) -> None:
    if a.vocab_size is not None and b.vocab_size is not None and a.vocab_size != b.vocab_size:
        raise UsageError(
            f"A has a vocabulary of {a.vocab_size} and B of {b.vocab_size}; compare two engines "
            "of one model and tokenizer"
        )


def _check_tokens(a: Mapping[str, tuple[int, ...]], b: Mapping[str, tuple[int, ...]] | None) -> None:
    for name, tokens in a.items():
        if b is not None and b.get(name, tokens) != tokens:
            other = b[name]
            at = next(
                (i for i, (x, y) in enumerate(zip(tokens, other, strict=False)) if x != y), min(len(tokens), len(other))
            )
            raise AlignmentError(
                f"the tokenizers differ: the prompt {name!r} has {len(tokens)} tokens in A and {len(other)} in B, "
                f"which part at token {at} (a BOS token that one of them adds?); give token ids"
            )
