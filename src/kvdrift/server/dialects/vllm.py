"""vLLM's OpenAI-compatible server: `prompt_logprobs`, token ids in both directions, a salt for the prefix cache.

Habits that matter:

* A request with `prompt_logprobs` does not read the prefix cache, so only decode routes can meet a warm one.
* `logprobs` is capped by the server (20 by default); one more than the sampled token is enough here.
* `max_tokens=0` is refused without `echo`; a score therefore asks for one token and ignores it.
* Logprobs below -9999 are cut off there.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError
from kvdrift.server.client import Client
from kvdrift.server.dialects.base import counted, field, gap, ids, logprob, replaced
from kvdrift.server.values import Cache, Generation, Prompt, Score, ServerFacts, Token

_SAMPLING = {
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class Vllm:
    """Speaks to vLLM, and to servers that took over its parameters."""

    takes_ids = True
    batches = True
    can_append = True

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        self.facts = facts
        self._client = client
        self._url = f"{client.api}/completions"
        self._where = f"POST {self._url}"
        # A salt that nobody else has: neither a neighbour's request nor an earlier run can have filled this cache.
        self._run = uuid.uuid4().hex
        self._count = itertools.count()

    def score_requests(self, n_tokens: int) -> int:
        """Return 1: all prompt logprobs come in one answer."""
        return 1

    def prepare(self, name: str, prompt: str | Sequence[int]) -> Prompt:
        """Return the ids; those of a text are what the server itself makes of it."""
        if not isinstance(prompt, str):
            return Prompt(name, tuple(prompt), None, len(prompt))
        choice = self._ask(prompt, 1, salt=self._salt("cold", name), return_token_ids=True)
        found = ids(field(choice, "prompt_token_ids", where=self._where), "prompt_token_ids", where=self._where)
        return Prompt(name, found, None, len(found))

    def spoil(self, prompt: Prompt) -> Prompt | None:
        """Return the prompt with its middle token replaced."""
        return replaced(prompt)

    def generate(self, prompt: Prompt, n_tokens: int, *, seed: int, cache: Cache) -> Generation:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        answer = self._client.post(
            self._url,
            self._body(prompt.ids, n_tokens, self._salt(cache, prompt.name))
            | {"seed": seed, "logprobs": 2, "return_token_ids": True, "return_tokens_as_token_ids": True}
            | {"ignore_eos": True},
        )
        choice = field(answer, "choices", 0, where=self._where)
        tokens = ids(field(choice, "token_ids", where=self._where), "choices", 0, "token_ids", where=self._where)
        values = field(choice, "logprobs", "token_logprobs", where=self._where)
        tops = field(choice, "logprobs", "top_logprobs", where=self._where)
        if not isinstance(values, list) or not isinstance(tops, list) or not len(tokens) == len(values) == len(tops):
            raise CaptureError(f"the answer to {self._where} has not as many logprobs as tokens ({len(tokens)})")
        gaps = [
            gap([v for v in top.values() if isinstance(v, int | float)]) if isinstance(top, dict) else None
            for top in tops
        ]
        return Generation(
            tokens,
            tuple(logprob(v, "token_logprobs", i, where=self._where) for i, v in enumerate(values)),
            tuple(gaps),
            counted(_maybe(answer, "usage", "prompt_tokens_details", "cached_tokens")),
            ended=choice.get("finish_reason") == "stop",
        )

    def score(
        self, prompt: Prompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score tokens by the logprobs of a prompt that holds them."""
        whole = (*_need(prompt), *(int(t) for t in tokens), *appended)
        choice = self._ask(whole, 1, salt=self._salt(cache, prompt.name), prompt_logprobs=0, return_token_ids=True)
        found = field(choice, "prompt_logprobs", where=self._where)
        if not isinstance(found, list) or len(found) != len(whole):
            said = len(found) if isinstance(found, list) else "no"
            raise CaptureError(f"the answer to {self._where} has {said} prompt logprobs for {len(whole)} tokens")
        first = prompt.n_tokens
        taken = _maybe(choice, "prompt_token_ids")
        if taken is not None and tuple(ids(taken, "prompt_token_ids", where=self._where)) != whole:
            raise CaptureError(f"{self._where} changed the token ids that it was given; they must be taken as they are")
        values = []
        for i, token in enumerate(tokens, start=first):
            entry = field(found, i, str(token), where=self._where)
            values.append(logprob(_maybe(entry, "logprob"), "prompt_logprobs", i, str(token), where=self._where))
        return Score(tuple(tokens), tuple(values), None)

    def _ask(self, prompt: Any, n_tokens: int, *, salt: str, **options: Any) -> Any:
        answer = self._client.post(self._url, self._body(prompt, n_tokens, salt) | options)
        return field(answer, "choices", 0, where=self._where)

    def _body(self, prompt: Any, n_tokens: int, salt: str) -> dict[str, Any]:
        asked = list(prompt) if isinstance(prompt, tuple) else prompt
        return {"model": self.facts.model, "prompt": asked, "max_tokens": n_tokens, "cache_salt": salt, **_SAMPLING}

    def _salt(self, cache: Cache, name: str) -> str:
        return f"{self._run}-{name}" if cache == "warm" else f"{self._run}-{next(self._count)}-cold"


def _need(prompt: Prompt) -> tuple[int, ...]:
    assert prompt.ids is not None, "this dialect prepares prompts as ids"
    return prompt.ids


def _maybe(value: Any, *path: str) -> Any:
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value
