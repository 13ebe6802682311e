"""What says logprobs of tokens while it runs: a server by its address, or an engine in this process.

Each samples tokens at temperature 1 by its decode steps, and scores given tokens by a prefill.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from kvdrift.capture.prompts import tokenize
from kvdrift.engines.base import EngineSequence, OpenEngine
from kvdrift.engines.displace import displace
from kvdrift.errors import CaptureError, UsageError
from kvdrift.logprobs.noise import ALIASES, STATED
from kvdrift.server.client import AGAINST_KEY_VARIABLE, KEY_VARIABLES, Client, key_from_environment
from kvdrift.server.dialects.base import Dialect, IdDialect
from kvdrift.server.dialects.detect import detect
from kvdrift.server.values import ServedPrompt
from kvdrift.trace.model import Trace
from kvdrift.versus.compare import opened
from kvdrift.vocabulary.plan import AuditPlan, Prompts
from kvdrift.vocabulary.progress import Progress
from kvdrift.vocabulary.sites import Site

Tokens = tuple[int, ...]
Tops = Mapping[int | str, float]

# So many of the likeliest tokens are kept beside the sampled one: they tell near ties and a temperature.
_N_TOPS = 16
# Longest text after a prompt. A server that scores one token a request gets the shorter one.
_SPAN, _SPAN_BY_TOKEN = 32, 8
# Dtypes that weights are numbers of; all others are packed.
_PLAIN = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Said:
    """Tokens with a logprob in nats for each, None where none was told, and the likeliest tokens of each step."""

    tokens: Tokens
    logprobs: tuple[float | None, ...]
    tops: tuple[Tops, ...] = ()


class Speaker(Protocol):
    """One side of a comparison by logprobs.

    Attributes:
        name: what it is, in words.
        dtype: what it computes in, in a word of `logprobs.noise`; None if that is not known.
        packed: the type of its quantised weights, None for weights that are numbers of `dtype`.
    """

    name: str
    dtype: str | None
    packed: str | None

    def ids(self, prompts: Prompts, span: int) -> dict[str, Tokens] | None:
        """Return the tokens of prompts, None where there are texts among them and it has no tokenizer."""
        ...

    def requests(self, span: int, *, samples: bool) -> int:
        """Return how many requests one text takes, sampled and scored or only scored."""
        ...

    def allow(self, n_texts: int, span: int, *, samples: bool) -> None:
        """Check that so many texts fit into the bound on requests.

        Raises:
            UsageError: they do not.
        """
        ...

    def sample(self, prompt: Tokens, span: int, seed: int) -> Said:
        """Sample `span` tokens after a prompt, each by a decode step."""
        ...

    def score(self, prompt: Tokens, tokens: Tokens) -> Said:
        """Score tokens after a prompt, all of them computed by one prefill."""
        ...


class ServerSpeaker:
    """A server that takes token ids."""

    def __init__(self, dialect: IdDialect, client: Client) -> None:
        facts = dialect.facts
        self.name = f"{facts.dialect} {facts.url} ({facts.model})"
        self.dtype, self.packed = computed_in(facts.weights if facts.quantised else facts.dtype, facts.cache_dtype)
        self._dialect = dialect
        self._client = client

    def ids(self, prompts: Prompts, span: int) -> dict[str, Tokens] | None:
        """Return the tokens that the server makes of prompts."""
        found = {}
        for name, prompt in prompts.items():
            ids = self._dialect.prepare(name, prompt).ids
            if not ids:
                raise UsageError(f"the prompt {name!r} has no tokens; give at least one")
            found[name] = ids
        return found

    def requests(self, span: int, *, samples: bool) -> int:
        """Return the requests of one text."""
        return int(samples) + self._dialect.score_all_requests(span)

    def allow(self, n_texts: int, span: int, *, samples: bool) -> None:
        """Check the bound on requests."""
        needed = n_texts * self.requests(span, samples=samples)
        if needed > self._client.n_left:
            raise UsageError(
                f"{n_texts} texts of {span} tokens take {needed} requests to {self._client.root}, and "
                f"{self._client.n_left} are left; use --max-requests {self._client.n_requests + needed} "
                "(max_requests=...), or a shorter --span"
            )

    def sample(self, prompt: Tokens, span: int, seed: int) -> Said:
        """Have tokens sampled alone on a cold cache."""
        found = self._dialect.generate(_served(prompt), span, seed=seed, cache="cold")
        return Said(tuple(int(token) for token in found.tokens), found.logprobs, _tops(found.tops))

    def score(self, prompt: Tokens, tokens: Tokens) -> Said:
        """Have tokens scored alone on a cold cache."""
        found = self._dialect.score_all(_served(prompt), tokens)
        return Said(tokens, found.logprobs, _tops(found.tops))


class EngineSpeaker:
    """An engine in this process, at its native precision."""

    def __init__(self, opened: OpenEngine) -> None:
        facts = opened.engine.info
        self.name = f"{facts.engine}: {facts.model}"
        # The engine of llama.cpp names its weights, its cache and its kernel: q4_1-kv_f16-flash.
        weights, *cache = (facts.autocast or facts.dtype).split("-kv_")
        self.dtype, self.packed = computed_in(weights, cache[0].split("-")[0] if cache else None)
        self._engine = opened.engine
        self._encode = opened.encode

    def ids(self, prompts: Prompts, span: int) -> dict[str, Tokens] | None:
        """Return the tokens of prompts by the engine's tokenizer."""
        if self._encode is None and any(isinstance(prompt, str) for prompt in prompts.values()):
            return None
        facts = self._engine.info
        return tokenize(
            prompts, self._encode, vocab_size=facts.vocab_size, max_positions=facts.max_positions, span=span
        )

    def requests(self, span: int, *, samples: bool) -> int:
        """Return 0: no request is sent."""
        return 0

    def allow(self, n_texts: int, span: int, *, samples: bool) -> None:
        """Do nothing: there is no bound."""

    def sample(self, prompt: Tokens, span: int, seed: int) -> Said:
        """Decode token by token, each sampled from what the step before says."""
        rng = np.random.default_rng(seed)
        sequence = self._engine.new_sequence(len(prompt) + span)
        tokens: list[int] = []
        logprobs: list[float | None] = []
        tops: list[Tops] = []
        try:
            row = self._fed(sequence, prompt, prompt, (len(prompt) - 1,))[0]
            while True:
                chances = np.exp(row)
                if not math.isfinite(chances.sum()):
                    raise CaptureError(
                        f"{self.name}: the logits of token {len(tokens)} are not finite; nothing can be sampled"
                    )
                token = int(rng.choice(row.size, p=chances / chances.sum()))
                logprobs.append(float(row[token]))
                tops.append(_likeliest(row))
                tokens.append(token)
                if len(tokens) == span:
                    break
                whole = (*prompt, *tokens)
                row = self._fed(sequence, (token,), whole, (len(whole) - 1,))[0]
        finally:
            sequence.close()
        # What decode has left in memory must not help the prefill that scores the same tokens.
        displace(self._engine, (*prompt, *tokens))
        return Said(tuple(tokens), tuple(logprobs), tuple(tops))

    def score(self, prompt: Tokens, tokens: Tokens) -> Said:
        """Prefill prompt and tokens at once."""
        whole = (*prompt, *tokens)
        sequence = self._engine.new_sequence(len(whole))
        try:
            rows = self._fed(sequence, whole, whole, tuple(range(len(prompt) - 1, len(whole) - 1)))
        finally:
            sequence.close()
        return Said(
            tokens,
            tuple(float(row[token]) for row, token in zip(rows, tokens, strict=True)),
            tuple(_likeliest(row) for row in rows),
        )

    def _fed(self, sequence: EngineSequence, fed: Tokens, whole: Tokens, probed: Tokens) -> list[NDArray[np.float64]]:
        """Feed tokens and return the logprobs [vocabulary] at each probed position."""
        trace = Trace("", "prefill", "as_designed", self._engine.info.dtype, whole)
        sequence.extend(fed, probe=probed, sink=trace)
        found = {
            position: values
            for record in trace.rows
            if record.site is Site.LOGITS
            for position, values in zip(record.positions, record.values, strict=True)
        }
        if any(position not in found for position in probed):
            raise CaptureError(f"{self.name} shows no logits; compare engines by their tensors instead")
        return [_log_softmax(np.asarray(found[position], dtype=np.float64).reshape(-1)) for position in probed]


@contextmanager
def speaking(
    target: Any, progress: Progress, *, model: str | None, max_requests: int, timeout_s: float, second: bool
) -> Iterator[Speaker]:
    """Open a server by its address, or an engine, while the context is open.

    Args:
        target: the address of a server, or what `compare_engines` takes.
        progress: hears what is being done.
        model: the name under which a server serves the model; None takes the only one.
        max_requests: upper bound on requests to a server.
        timeout_s: how long one answer of it may take.
        second: whether another server comes first: the API key of that one is not sent to this one.

    Raises:
        UsageError: the server takes no token ids.
        EngineUnavailable: it cannot be had.
    """
    if not is_server(target):
        # Of what is recorded the logits alone are read; one layer beside them is the least.
        with opened(target, progress, AuditPlan(layers=(0,))) as engine:
            yield EngineSpeaker(engine)
        return
    key = key_from_environment({KEY_VARIABLES[0]: os.environ.get(AGAINST_KEY_VARIABLE, "")} if second else None)
    with Client(str(target), key=key, timeout_s=timeout_s, max_requests=max_requests) as client:
        dialect: Dialect = detect(client, model, None)
        if not isinstance(dialect, IdDialect):
            raise UsageError(
                f"{dialect.facts.dialect} at {client.root} takes prompts as text alone, and both sides must say "
                "something of the same token ids; audit it by itself (kvdrift audit ADDRESS)"
            )
        yield ServerSpeaker(dialect, client)


def is_server(target: object) -> bool:
    """Whether something is the address of a server."""
    return isinstance(target, str) and target.startswith(("http://", "https://"))


def computed_in(weights: str | None, cache: str | None) -> tuple[str | None, str | None]:
    """Return the coarsest dtype of weights and cache in a word of `logprobs.noise`, and the type of packed weights.

    Either is None where it is not known, or does not apply.

    >>> computed_in("all F32", "float16"), computed_in("Q4_K - Medium", "float16"), computed_in("bfloat16", None)
    (('float16', None), (None, 'q4_k'), ('bfloat16', None))
    """
    if weights is None:
        return None, None
    word = weights.lower().removeprefix("torch.").removeprefix("all ").split(" ")[0]
    named = [ALIASES.get(text, text) for text in (word, (cache or word).lower())]
    if named[0] not in _PLAIN:
        return None, word
    return max((name for name in named if name in STATED), key=STATED.__getitem__), None


def longest_span(*speakers: Speaker) -> int:
    """Return how many tokens each text has if nothing was said: fewer where a token costs a request."""
    by_token = any(speaker.requests(_SPAN, samples=False) > 1 for speaker in speakers)
    return _SPAN_BY_TOKEN if by_token else _SPAN


def _served(ids: Tokens) -> ServedPrompt:
    return ServedPrompt("", ids, None, len(ids))


def _tops(told: Sequence[Mapping[Any, float]]) -> tuple[Tops, ...]:
    return tuple({int(token): value for token, value in step.items()} for step in told)


def _likeliest(row: NDArray[np.float64]) -> Tops:
    n = min(_N_TOPS, row.size)
    places = np.argpartition(-row, n - 1)[:n]
    return {int(place): float(row[place]) for place in places}


def _log_softmax(row: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logprobs of logits [vocabulary] in nats; NaN and infinite logits give NaN."""
    with np.errstate(invalid="ignore", over="ignore"):
        moved = row - np.max(row)
        found: NDArray[np.float64] = moved - np.log(np.sum(np.exp(moved)))
    return found
