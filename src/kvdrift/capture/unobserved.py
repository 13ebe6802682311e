"""One prompt once more while nothing watches, twice: is what is judged what the engine runs, and does it run the same
each time?

Knows sequences of `extend`; knows nothing of tensors' meaning or of verdicts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import cast

import numpy as np

from kvdrift.engines.base import CanGoUnobserved, LiveEngine
from kvdrift.engines.displace import displace
from kvdrift.errors import NotApplicable
from kvdrift.trace.model import PassPair, Trace
from kvdrift.trace.recording import RecordedPair
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode, PairRole
from kvdrift.vocabulary.sites import Site

# How often a pass is run that draws random numbers, or prefill beside a decode whose bits differ, before it counts as
# one that gives the same bits each time.
_MOST_RUNS = 10

Run = Callable[[LiveEngine, Prompt, str, str], Trace]


def capture_unobserved(engine: LiveEngine, prompt: Prompt, rung: str, seen: PassPair | None) -> Iterator[RecordedPair]:
    """Run prefill and decode of `prompt` while nothing watches, each twice, and pair them with what was seen.

    Args:
        engine: runs at `rung`. One that cannot go unobserved there yields nothing.
        prompt: decode takes all of its steps.
        rung: the precision that the engine runs at.
        seen: the pair of as_designed; None to run both passes again, watched and with the same arguments.
    """
    if not hasattr(engine, "unobserved"):
        return
    free = cast(CanGoUnobserved, engine)
    passes: list[tuple[Trace, Trace, tuple[int, ...]]] = []
    try:
        watched = (None, None) if seen is None else (seen.prefill, seen.decode)
        if seen is None:
            with free.unobserved(watched=True):
                watched = (_prefill(engine, prompt, rung, "watched"), _steps(engine, prompt, rung, "watched"))
        with free.unobserved() as told:
            displace(engine, prompt.tokens)
            for run, first, positions in (
                (_steps, watched[1], prompt.probed),
                (_prefill, watched[0], prompt.probed[-1:]),
            ):
                assert first is not None
                again = run(engine, prompt, rung, "unobserved")
                passes.append((first, again, positions))
                often = told.draws or any(_bits(one) != _bits(other) for one, other, _ in passes[1::2])
                passes.append((again, _repeat(run, engine, prompt, rung, again, often), positions))
    except NotApplicable:
        return
    for index, (first, second, positions) in enumerate(passes):
        role = PairRole.REPEAT if index % 2 else PairRole.UNOBSERVED
        yield RecordedPair(role, PassPair(Mode.AS_DESIGNED, first, second, positions))


def _repeat(run: Run, engine: LiveEngine, prompt: Prompt, rung: str, first: Trace, often: bool) -> Trace:
    """Run a pass again, and several times if `often`, until its bits differ."""
    again = run(engine, prompt, rung, "unobserved_again")
    for _ in range(_MOST_RUNS - 2 if often else 0):
        if _bits(again) != _bits(first):
            break
        again = run(engine, prompt, rung, "unobserved_again")
    return again


def _bits(trace: Trace) -> list[bytes]:
    return [np.ascontiguousarray(record.values).tobytes() for record in trace.rows if record.site is Site.LOGITS]


def _prefill(engine: LiveEngine, prompt: Prompt, rung: str, label: str) -> Trace:
    """All tokens in one call, as a generation loop would feed a prompt."""
    trace = Trace(prompt.name, "prefill", label, rung, prompt.tokens)
    sequence = engine.new_sequence(len(prompt.tokens))
    sequence.extend(prompt.tokens, probe=prompt.probed[-1:], sink=trace)
    sequence.close()
    return trace


def _steps(engine: LiveEngine, prompt: Prompt, rung: str, label: str) -> Trace:
    """The prompt in one call, then the continuation token by token."""
    trace = Trace(prompt.name, "decode", label, rung, prompt.tokens)
    sequence = engine.new_sequence(len(prompt.tokens))
    sequence.extend(prompt.prompt)
    for position, token in zip(prompt.probed, prompt.continuation, strict=True):
        sequence.extend([token], probe=(position,), sink=trace)
    sequence.close()
    return trace
