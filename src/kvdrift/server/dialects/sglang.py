"""SGLang's native `/generate`: `return_logprob` with `logprob_start_len`, token ids in both directions.

Habits that matter:

* Tokens before `logprob_start_len` may come out of the radix cache, those behind it are computed. A score starts at 0.
* `cache_salt` keeps the cache of one request apart from all others. Flushing the whole cache, as SGLang's own tests do,
  would hurt everybody else on the server.
* `sampling_seed` is honoured only when the server samples deterministically; without it two samples differ, and each
  is scored by itself.
"""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError
from kvdrift.server.client import Client
from kvdrift.server.dialects.base import counted, field, gap, logprob, replaced
from kvdrift.server.values import Cache, Generation, Prompt, Score, ServerFacts, Token


class Sglang:
    """Speaks to SGLang's own endpoint, which lies beside /v1."""

    takes_ids = True
    batches = True
    can_append = True

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        self.facts = facts
        self._client = client
        self._url = f"{client.root}/generate"
        self._where = f"POST {self._url}"
        self._run = uuid.uuid4().hex
        self._count = itertools.count()

    def score_requests(self, n_tokens: int) -> int:
        """Return 1: all input logprobs come in one answer."""
        return 1

    def prepare(self, name: str, prompt: str | Sequence[int]) -> Prompt:
        """Return the ids; those of a text are read off its input logprobs."""
        if not isinstance(prompt, str):
            return Prompt(name, tuple(prompt), None, len(prompt))
        meta = self._ask({"text": prompt}, 1, seed=0, salt=self._salt("cold", name), start=0)
        found = tuple(token for _, token in self._values(meta, "input_token_logprobs"))
        return Prompt(name, found, None, len(found))

    def spoil(self, prompt: Prompt) -> Prompt | None:
        """Return the prompt with its middle token replaced."""
        return replaced(prompt)

    def generate(self, prompt: Prompt, n_tokens: int, *, seed: int, cache: Cache) -> Generation:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        assert prompt.ids is not None
        salt = self._salt(cache, prompt.name)
        meta = self._ask({"input_ids": list(prompt.ids)}, n_tokens, seed=seed, salt=salt, start=-1, tops=2)
        found = self._values(meta, "output_token_logprobs")
        tops = meta.get("output_top_logprobs") or [None] * len(found)
        gaps = [
            gap([float(item[0]) for item in top if isinstance(item, list) and isinstance(item[0], int | float)])
            if isinstance(top, list)
            else None
            for top in tops
        ]
        if len(gaps) != len(found):
            raise CaptureError(
                f"the answer to {self._where} has {len(gaps)} lists of top logprobs for {len(found)} tokens"
            )
        reason = meta.get("finish_reason")
        return Generation(
            tuple(token for _, token in found),
            tuple(logprob(v, "output_token_logprobs", i, where=self._where) for i, (v, _) in enumerate(found)),
            tuple(gaps),
            counted(meta.get("cached_tokens")),
            ended=isinstance(reason, dict) and reason.get("type") == "stop",
        )

    def score(
        self, prompt: Prompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score tokens by the input logprobs of a prompt that holds them."""
        assert prompt.ids is not None
        whole = (*prompt.ids, *(int(t) for t in tokens), *appended)
        salt = self._salt(cache, prompt.name)
        meta = self._ask({"input_ids": list(whole)}, 1, seed=0, salt=salt, start=0)
        found = self._values(meta, "input_token_logprobs")
        if tuple(token for _, token in found) != whole:
            raise CaptureError(f"{self._where} scored {len(found)} tokens, and not the {len(whole)} that it was given")
        cached = counted(meta.get("cached_tokens"))
        part = found[prompt.n_tokens : prompt.n_tokens + len(tokens)]
        return Score(
            tuple(tokens),
            tuple(logprob(v, "input_token_logprobs", i, where=self._where) for i, (v, _) in enumerate(part)),
            None if cached is None else len(whole) - cached,
        )

    def _ask(
        self, prompt: dict[str, Any], n_tokens: int, *, seed: int, salt: str, start: int, tops: int = 0
    ) -> dict[str, Any]:
        body = {
            **prompt,
            "sampling_params": {
                "temperature": 1.0,
                "top_p": 1.0,
                "top_k": -1,
                "min_p": 0.0,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "max_new_tokens": n_tokens,
                "ignore_eos": True,
                "sampling_seed": seed,
            },
            "return_logprob": True,
            "logprob_start_len": start,
            "top_logprobs_num": tops,
            "cache_salt": salt,
        }
        meta = field(self._client.post(self._url, body), "meta_info", where=self._where)
        if not isinstance(meta, dict):
            raise CaptureError(f"the answer to {self._where} has no meta_info")
        return meta

    def _values(self, meta: dict[str, Any], name: str) -> list[tuple[Any, int]]:
        """Return (logprob, token id) of each token; the logprob of a prompt's first token is None."""
        items = meta.get(name)
        if not isinstance(items, list):
            raise CaptureError(f"the answer to {self._where} has no meta_info.{name}; is return_logprob switched off?")
        found = []
        for i, item in enumerate(items):
            if not isinstance(item, list | tuple) or len(item) < 2 or not isinstance(item[1], int):
                raise CaptureError(f"the answer to {self._where} has no logprob and token id at meta_info.{name}[{i}]")
            found.append((item[0], item[1]))
        return found

    def _salt(self, cache: Cache, name: str) -> str:
        return f"{self._run}-{name}" if cache == "warm" else f"{self._run}-{next(self._count)}-cold"
