"""The same tokens again and again: run after run, in batches of other sizes, and beside other neighbours."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kvdrift.engines.base import EngineRows, EngineSequence, LiveEngine, Routes
from kvdrift.engines.displace import displace, other_tokens
from kvdrift.trace.model import PassPair, Trace
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import Mode

# A text as long as the prompt for each row of the largest batch.
BATCH_SIZES = (1, 2, 8)
_LABEL = "repeat"


@dataclass(frozen=True, slots=True)
class Rerun:
    """A text that was run twice: `pair` has the run that is the standard first, `text` is the number of its text.

    `where` names the second: a run, or a row of a batch. `group` is "runs", "batch of 2", "neighbours of 8", ...
    """

    group: str
    where: str
    text: int
    pair: PassPair


def texts_of(prompt: Prompt, vocab_size: int | None, n_texts: int) -> list[tuple[int, ...]]:
    """Return the prompt with its continuation, and other texts of that length out of the same tokens, all different."""
    texts = [prompt.tokens]
    while len(texts) < n_texts:
        turned = other_tokens(texts[-1], vocab_size)
        texts.append(turned if turned not in texts else tuple(turned[1:] + turned[:1]))
    return texts


def run_alone(engine: LiveEngine, tokens: Sequence[int], n_steps: int, rung: str, probed: Sequence[int]) -> Trace:
    """Record one run of a text: a prefill, then its last `n_steps` tokens one by one, at the positions `probed`."""
    trace = Trace("text", "prefill", _LABEL, rung, tuple(tokens))
    sequence: EngineSequence = engine.new_sequence(len(tokens))
    for start, stop in _calls(len(tokens), n_steps):
        sequence.extend(tokens[start:stop], probe=[p for p in probed if start <= p < stop], sink=trace)
    sequence.close()
    return trace


def run_rows(
    routes: Routes, texts: Sequence[Sequence[int]], n_steps: int, rung: str, probed: Sequence[int]
) -> list[Trace]:
    """Record texts of one length as the rows of a batch, each as `run_alone` does."""
    traces = [Trace("text", "prefill", _LABEL, rung, tuple(text)) for text in texts]
    batch: EngineRows = routes.new_rows(len(texts), len(texts[0]))
    for start, stop in _calls(len(texts[0]), n_steps):
        at = [p for p in probed if start <= p < stop]
        batch.extend(
            [text[start:stop] for text in texts],
            probes=dict.fromkeys(range(len(texts)), at),
            sinks=dict(enumerate(traces)),
        )
    batch.close()
    return traces


def _calls(length: int, n_steps: int) -> Iterator[tuple[int, int]]:
    first = length - n_steps
    yield 0, first
    yield from ((at, at + 1) for at in range(first, length))


def rerun(engine: LiveEngine, prompt: Prompt, n_runs: int, rung: str) -> Iterator[Rerun]:
    """Run a prompt `n_runs` times and yield each later run beside the first.

    Before every other run the engine computes other tokens, so that what calls leave behind is seen too.
    """
    probed = _probed(prompt)
    first = run_alone(engine, prompt.tokens, len(prompt.continuation), rung, probed)
    for number in range(2, n_runs + 1):
        if number % 2:
            displace(engine, prompt.tokens)
        again = run_alone(engine, prompt.tokens, len(prompt.continuation), rung, probed)
        yield Rerun("runs", f"run {number}", 0, _pair(first, again, probed))


def rerun_in_batches(engine: LiveEngine, routes: Routes, prompt: Prompt, rung: str) -> Iterator[Rerun]:
    """Yield every row of batches of each size beside the same text in a batch of one, then the first text beside itself
    among other neighbours in a batch of the same size."""
    n_steps, probed = len(prompt.continuation), _probed(prompt)
    texts = texts_of(prompt, engine.info.vocab_size, max(BATCH_SIZES) + 1)
    alone = [run_rows(routes, [text], n_steps, rung, probed)[0] for text in texts[:-1]]
    for size in BATCH_SIZES[1:]:
        rows = run_rows(routes, texts[:size], n_steps, rung, probed)
        for number, row in enumerate(rows):
            yield Rerun(f"batch of {size}", f"row {number}", number, _pair(alone[number], row, probed))
        others = run_rows(routes, [texts[0], *texts[-1:-size:-1]], n_steps, rung, probed)
        yield Rerun(f"neighbours of {size}", "row 0", 0, _pair(rows[0], others[0], probed))


def _probed(prompt: Prompt) -> tuple[int, ...]:
    """The last token of the prompt, and all that are decoded behind it."""
    return tuple(range(len(prompt.prompt) - 1, len(prompt.tokens)))


def _pair(first: Trace, second: Trace, probed: tuple[int, ...]) -> PassPair:
    return PassPair(Mode.AS_DESIGNED, first, second, probed)
