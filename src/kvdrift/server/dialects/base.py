"""What a dialect offers, and what dialects share: dialects of token ids differ in their requests and answers alone.

A new dialect is a module with one subclass of `Dialect` or `IdDialect`, and its line in `detect.DIALECTS`.
"""

from __future__ import annotations

import itertools
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from kvdrift.server.client import Client
from kvdrift.server.dialects.answers import Part, gap
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token, Tops, Walked

# Sampling without filters and penalties, in words that all dialects share. K3 needs tokens that were sampled from
# the very distribution whose logprobs are reported.
PLAIN_SAMPLING: Mapping[str, Any] = {
    "temperature": 1.0,
    "top_p": 1.0,
    "min_p": 0.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Dialect(ABC):
    """One kind of server. All sampling is at temperature 1 without filters or penalties.

    Attributes:
        path: where its requests go, below the root of the server.
        takes_ids: whether prompts can be token ids.
        batches: whether requests in flight at once are computed together.
        can_append: whether a score can be taken with more tokens behind the scored ones.
        forces: whether tokens can be fed one a request on top of the prefix cache (`walk`).
    """

    path: ClassVar[str]
    takes_ids: ClassVar[bool] = True
    batches: bool = True
    can_append: ClassVar[bool] = True
    forces: ClassVar[bool] = False

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        self.facts = facts
        self._client = client
        self._where = f"POST {client.root}{self.path}"

    @classmethod
    @abstractmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> Dialect | None:
        """Return the dialect if the server speaks it, None if not.

        Args:
            client: the way to the server.
            model: the model to ask for.
            dtype: what the user says that the server computes in, None if nothing was said.
        """

    @abstractmethod
    def prepare(self, name: str, prompt: str | Sequence[int]) -> ServedPrompt:
        """Return the prompt as the server takes it."""

    @abstractmethod
    def spoil(self, prompt: ServedPrompt) -> ServedPrompt | None:
        """Return the prompt with one token replaced, as many tokens long; None if that cannot be done."""

    @abstractmethod
    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample `n_tokens` tokens, past the end of the text where the server allows it.

        `cache` "warm" allows the prefix cache that an earlier warm request of this prompt has filled.
        """

    @abstractmethod
    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score given tokens after the prompt, with `appended` behind them, all computed as a prompt."""

    def walk(self, prompt: ServedPrompt, tokens: Sequence[Token], *, whole: bool) -> Walked:
        """Score given tokens by all ways of prefill; without `whole` by those alone that `GENERATION` needs."""
        raise NotImplementedError(f"{type(self).__name__} forces no tokens")

    def walk_requests(self, n_tokens: int, *, whole: bool) -> int:
        """Return how many requests a `walk` along `n_tokens` generated tokens takes; 0 where there is none."""
        return 0

    def score_requests(self, n_tokens: int) -> int:
        """Return how many requests one score of `n_tokens` generated tokens takes."""
        return 1

    def _post(self, body: Mapping[str, Any], path: str | None = None) -> Part:
        path = path or self.path
        return Part(self._client.post(f"{self._client.root}{path}", body), f"POST {self._client.root}{path}")

    def _completion(self, choice: Part, tokens: Sequence[Token], **more: Any) -> ServedTokens:
        """Return the generation that a choice of OpenAI's completions tells."""
        logprobs = choice["logprobs"]
        tops = [top.value for top in logprobs["top_logprobs"].items()]
        return self._generation(
            tokens,
            logprobs["token_logprobs"].items(),
            [top.values() if isinstance(top, dict) else () for top in tops],
            ended=choice.find("finish_reason") == "stop",
            **more,
        )

    def _generation(
        self,
        tokens: Sequence[Token],
        values: Sequence[Part],
        tops: Sequence[Iterable[Any]],
        likeliest: Sequence[Tops] = (),
        **more: Any,
    ) -> ServedTokens:
        """Return a generation; `tops` has the logprobs of the likeliest tokens at each step, `likeliest` with ids.

        Raises:
            CaptureError: there are not as many logprobs as tokens, or one is not a number.
        """
        if not len(tokens) == len(values) == len(tops):
            raise Part(None, self._where).error(f"has not as many logprobs as tokens ({len(tokens)})")
        return ServedTokens(
            tuple(tokens),
            tuple(value.logprob() for value in values),
            tuple(gap(top) for top in tops),
            tops=tuple(likeliest),
            **more,
        )


class IdDialect(Dialect):
    """A dialect that takes token ids and gives token ids."""

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        super().__init__(client, facts)
        # A salt that nobody else has: neither a neighbour's request nor an earlier run can have filled this cache.
        self._run = uuid.uuid4().hex
        self._count = itertools.count()

    @abstractmethod
    def tokenize(self, name: str, text: str) -> tuple[int, ...]:
        """Return the ids that the server itself makes of a text."""

    def prepare(self, name: str, prompt: str | Sequence[int]) -> ServedPrompt:
        """Return the ids of a prompt."""
        ids = self.tokenize(name, prompt) if isinstance(prompt, str) else tuple(prompt)
        return ServedPrompt(name, ids, None, len(ids))

    def score_all(self, prompt: ServedPrompt, tokens: Sequence[Token]) -> Score:
        """Score given tokens after the prompt, every one of them, on a cold cache."""
        return self.score(prompt, tokens)

    def score_all_requests(self, n_tokens: int) -> int:
        """Return how many requests `score_all` of `n_tokens` generated tokens takes."""
        return self.score_requests(n_tokens)

    def spoil(self, prompt: ServedPrompt) -> ServedPrompt | None:
        """Return the prompt with its middle token replaced by another one of the same prompt; None if all are alike."""
        ids = ids_of(prompt)
        middle = len(ids) // 2
        other = next((i for i in (*ids[middle + 1 :], *ids[:middle]) if i != ids[middle]), None)
        if other is None or len(ids) < 3:
            return None
        return ServedPrompt(prompt.name, (*ids[:middle], other, *ids[middle + 1 :]), None, prompt.n_tokens)

    def _salt(self, cache: Cache, name: str) -> str:
        """Return what keeps the prefix cache of a request apart: one salt per warm prompt, one per cold request."""
        return f"{self._run}-{name}" if cache == "warm" else f"{self._run}-{next(self._count)}-cold"


def ids_of(prompt: ServedPrompt, *more: Sequence[Token]) -> tuple[int, ...]:
    """Return the ids of a prompt that was prepared as ids, with more tokens behind it."""
    assert prompt.ids is not None, "this dialect prepares prompts as ids"
    return (*prompt.ids, *(int(token) for tokens in more for token in tokens))


def dtype_facts(told: str | None) -> dict[str, Any]:
    """Return the dtype of a server that tells none itself, as fields of `ServerFacts`."""
    return {"dtype": told, "dtype_from": "--dtype" if told else None}
