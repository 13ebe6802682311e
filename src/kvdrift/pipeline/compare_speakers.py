"""A against B by what they say while they run, where one of them or both are servers. Only composes.

A samples texts, so that its logprobs are those of decode steps, and scores them again by a prefill. B scores the same
tokens. The three become dumps of logprobs, and are judged as such.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvdrift.errors import AlignmentError, CaptureError, UsageError
from kvdrift.logprobs.compare import LogprobComparison, compare_dumps
from kvdrift.logprobs.dump import SequenceRecord, as_columns
from kvdrift.logprobs.outcome import LogprobPlan
from kvdrift.pipeline.speakers import Said, Speaker, Tokens, is_server, longest_span, speaking
from kvdrift.report.run_directory import RunDirectory
from kvdrift.server.prompts import DEFAULT_PROMPTS
from kvdrift.vocabulary.plan import Prompts
from kvdrift.vocabulary.progress import Progress, Silent

# Texts sampled in all. Thirteen are the fewest whose signs give a p-value of alpha / 3 at alpha = 0.001.
_N_TEXTS = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeakerPlan:
    """How two speakers are asked.

    Attributes:
        model_a, model_b: the names under which servers serve the model; None takes the only one.
        span: tokens of each text; None takes 32, or 8 from servers that score one token a request.
        seed: of the first text; the others follow it.
        max_requests: upper bound on requests to each server, retries included.
        timeout: seconds that one answer may take.
    """

    model_a: str | None = None
    model_b: str | None = None
    span: int | None = None
    seed: int = 0
    max_requests: int = 300
    timeout: float = 60.0

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 2:
            raise UsageError(f"span is {self.span}; the first token comes out of a prefill; use --span 8 (span=8)")
        if self.max_requests < 1:
            raise UsageError(f"max_requests is {self.max_requests}, and must be at least 1; use --max-requests 300")
        if not (math.isfinite(self.timeout) and self.timeout > 0.0):
            raise UsageError(f"the timeout is {self.timeout} s, and must be above 0; use --timeout 60 (timeout=60)")


@dataclass(frozen=True, slots=True)
class _Text:
    name: str
    prompt: Tokens
    seed: int


def compare_speakers(
    a: Any,
    b: Any,
    asked: SpeakerPlan,
    plan: LogprobPlan,
    *,
    prompts: Prompts | None = None,
    out: Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
) -> LogprobComparison:
    """Compare two servers, or a server with an engine: A samples, both score.

    The run directory keeps what was said as a.jsonl, b.jsonl and third.jsonl.

    Raises:
        UsageError: an option cannot be used, or the bound on requests is too low.
        AlignmentError: the tokenizers differ.
        EngineUnavailable, CaptureError: one of them cannot be had, or failed.
    """
    told = progress or Silent()
    given = DEFAULT_PROMPTS if prompts is None else prompts
    if not given:
        raise UsageError("no prompts were given; pass at least one (--prompt TEXT, prompts={...})")
    common: dict[str, Any] = {"max_requests": asked.max_requests, "timeout_s": asked.timeout}
    both_serve = is_server(a) and is_server(b)
    with (
        RunDirectory(out) as directory,
        speaking(a, told, model=asked.model_a, second=False, **common) as first,
        speaking(b, told, model=asked.model_b, second=both_serve, **common) as second,
    ):
        span = asked.span or longest_span(first, second)
        ids = _ids(first, second, given, span)
        texts = _texts(ids, asked.seed)
        first.allow(len(texts), span, samples=True)
        second.allow(len(texts), span, samples=False)
        told.start(3 * len(texts))
        sampled: dict[str, Said] = {}
        for text in texts:
            told.step(f"A samples {text.name}")
            sampled[text.name] = first.sample(text.prompt, span, text.seed)
        texts = [text for text in texts if sampled[text.name].tokens]
        if not texts:
            raise CaptureError(f"{first.name} sampled no token after any prompt")
        # A score directly after its own generation may be answered from what decode has left.
        said = {"A": sampled, "third": _scored(first, "A", texts, sampled, told)}
        said["B"] = _scored(second, "B", texts, sampled, told)
        names = {"A": first.name, "B": second.name, "third": f"{first.name}, prefill"}
        records = {side: _records(texts, said[side]) for side in ("A", "B", "third")}
        if directory.work is not None:
            for side, each in records.items():
                (directory.work / f"{side.lower()}.jsonl").write_text(_lines(each), encoding="utf-8")
        dumps = {side: as_columns(names[side], each) for side, each in records.items()}
        return compare_dumps(dumps, _with_dtypes(plan, first, second), directory, command=command)


def _ids(a: Speaker, b: Speaker, prompts: Prompts, span: int) -> dict[str, Tokens]:
    """Return the tokens of all prompts, which both sides must cut alike."""
    one, other = a.ids(prompts, span), b.ids(prompts, span)
    if one is None and other is None:
        raise UsageError("neither side has a tokenizer; give token ids (--prompts FILE with token_ids, prompts={...})")
    for name in one or ():
        if one is not None and other is not None and one[name] != other[name]:
            raise AlignmentError(
                f"the tokenizers differ: the prompt {name!r} has {len(one[name])} tokens in A and {len(other[name])} "
                "in B (a BOS token that one of them adds?); give token ids"
            )
    found = one if one is not None else other
    assert found is not None
    return found


def _texts(ids: Mapping[str, Tokens], seed: int) -> list[_Text]:
    """Return so many texts of every prompt that there are enough units."""
    each = -(-_N_TEXTS // len(ids))
    names = [(f"{name} #{n + 1}" if each > 1 else name, ids[name]) for n in range(each) for name in ids]
    return [_Text(name, prompt, seed + number) for number, (name, prompt) in enumerate(names)]


def _scored(
    speaker: Speaker, side: str, texts: Sequence[_Text], sampled: Mapping[str, Said], progress: Progress
) -> dict[str, Said]:
    found = {}
    for text in texts:
        progress.step(f"{side} scores {text.name}")
        found[text.name] = speaker.score(text.prompt, sampled[text.name].tokens)
    return found


def _records(texts: Sequence[_Text], said: Mapping[str, Said]) -> list[SequenceRecord]:
    found = []
    for text in texts:
        item = said[text.name]
        found.append(
            SequenceRecord(
                name=text.name,
                tokens=item.tokens,
                logprobs=item.logprobs,
                top=_tops_of(item),
                prompt=text.prompt,
            )
        )
    return found


def _tops_of(said: Said) -> list[Mapping[int | str, float] | None] | None:
    """Return the likeliest tokens of each step, None where nobody told any."""
    if len(said.tops) != len(said.tokens) or not any(said.tops):
        return None
    return [step or None for step in said.tops]


def _lines(records: Sequence[SequenceRecord]) -> str:
    """Return records in the shape of docs/compare.md, one object a line; a logprob that is not finite is a text."""
    lines = []
    for record in records:
        line: dict[str, Any] = {
            "id": record.name,
            "prompt_token_ids": list(record.prompt or ()),
            "token_ids": list(record.tokens),
            "logprobs": [v if v is None or math.isfinite(v) else str(v) for v in record.logprobs],
        }
        if record.top is not None:
            line["top_logprobs"] = [
                [[value, token] for token, value in step.items()] if step else None for step in record.top
            ]
        lines.append(json.dumps(line, allow_nan=False))
    return "\n".join(lines) + "\n"


def _with_dtypes(plan: LogprobPlan, a: Speaker, b: Speaker) -> LogprobPlan:
    """Return the plan with what each side says that it computes in, where the caller said nothing."""
    alike = a.packed is not None and a.packed == b.packed
    return LogprobPlan(
        dtype_a=plan.dtype_a or _computes_in(a, alike),
        dtype_b=plan.dtype_b or _computes_in(b, alike),
        drop=plan.drop,
        alpha=plan.alpha,
        seed=plan.seed,
    )


def _computes_in(speaker: Speaker, alike: bool) -> str | None:
    """Return the dtype whose rounding is expected of one side.

    Of quantised weights llama.cpp rounds activations to 8 bits. Where both sides hold the same ones that is all that
    they may differ by; else the rounding of the weights comes on top.
    """
    if speaker.packed is None:
        return speaker.dtype
    return "int8" if alike or "8" in speaker.packed else "int4"
