"""llama.cpp's own server (`llama-server`), by its native /completion.

It has no prompt logprobs. A token is scored by prefilling everything in front of it, with `cache_prompt` off, and
asking for one token, which a logit bias forces to be the wanted one: reported logprobs are taken before sampling and
before the bias. That is one request for each scored token, so only some tokens of a generation are scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError
from kvdrift.server.client import Client
from kvdrift.server.dialects.base import counted, field, gap, ids, logprob, replaced
from kvdrift.server.values import Cache, Generation, Prompt, Score, ServerFacts, Token

_SAMPLERS = {
    "temperature": 1.0,
    "samplers": ["temperature"],
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "dynatemp_range": 0.0,
}
# Large enough to make any token certain, small enough to stay finite in float16.
_CERTAIN = 10000.0


class LlamaCpp:
    """Speaks to llama-server."""

    takes_ids = True
    batches = True
    can_append = False

    def __init__(self, client: Client, facts: ServerFacts) -> None:
        self.facts = facts
        self._client = client
        self._url = f"{client.root}/completion"
        self._where = f"POST {self._url}"

    def score_requests(self, n_tokens: int) -> int:
        """Return how many tokens are scored, each by its own request."""
        return len(scored_indices(n_tokens))

    def prepare(self, name: str, prompt: str | Sequence[int]) -> Prompt:
        """Return the ids that /tokenize makes of a text, BOS included where the model has one."""
        if not isinstance(prompt, str):
            return Prompt(name, tuple(prompt), None, len(prompt))
        url = f"{self._client.root}/tokenize"
        answer = self._client.post(url, {"content": prompt, "add_special": True, "parse_special": True})
        found = ids(field(answer, "tokens", where=f"POST {url}"), "tokens", where=f"POST {url}")
        return Prompt(name, found, None, len(found))

    def spoil(self, prompt: Prompt) -> Prompt | None:
        """Return the prompt with its middle token replaced."""
        return replaced(prompt)

    def generate(self, prompt: Prompt, n_tokens: int, *, seed: int, cache: Cache) -> Generation:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        answer = self._ask(prompt.ids or (), n_tokens, seed=seed, cached=cache == "warm", n_probs=2)
        tokens = ids(field(answer, "tokens", where=self._where), "tokens", where=self._where)
        items = field(answer, "completion_probabilities", where=self._where)
        if not isinstance(items, list) or len(items) != len(tokens):
            raise CaptureError(f"the answer to {self._where} has not as many logprobs as tokens ({len(tokens)})")
        values, gaps = [], []
        for i, (item, token) in enumerate(zip(items, tokens, strict=True)):
            if field(item, "id", where=self._where) != token:
                raise CaptureError(
                    f"the answer to {self._where} gives token {i} two ids; its logprobs cannot be placed"
                )
            values.append(logprob(item.get("logprob"), "completion_probabilities", i, "logprob", where=self._where))
            tops = [t.get("logprob") for t in item.get("top_logprobs") or [] if isinstance(t, dict)]
            gaps.append(gap([t for t in tops if isinstance(t, int | float)]))
        return Generation(
            tokens,
            tuple(values),
            tuple(gaps),
            counted((answer.get("timings") or {}).get("cache_n")),
            ended=answer.get("stop_type") == "eos",
        )

    def score(
        self, prompt: Prompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score some of the tokens, each as what follows a freshly prefilled prefix."""
        assert not appended, "a next-token score has nothing behind it"
        given = tuple(int(t) for t in tokens)
        values: list[float | None] = [None] * len(given)
        missing: int | None = None  # prefix tokens that some request did not compute, None if the server never told
        for i in scored_indices(len(given)):
            whole = (*(prompt.ids or ()), *given[:i])
            answer = self._ask(whole, 1, seed=0, cached=cache == "warm", n_probs=1, force=given[i])
            item = field(answer, "completion_probabilities", 0, where=self._where)
            if field(item, "id", where=self._where) != given[i]:
                raise CaptureError(f"{self._where} ignores logit_bias, so the token {given[i]} cannot be scored there")
            values[i] = logprob(item.get("logprob"), "completion_probabilities", 0, "logprob", where=self._where)
            done = counted((answer.get("timings") or {}).get("prompt_n"))
            if done is not None:
                missing = max(missing or 0, len(whole) - done)
        n_computed = None if missing is None else prompt.n_tokens + len(given) - max(0, missing)
        return Score(given, tuple(values), n_computed)

    def _ask(
        self, prompt: Sequence[int], n_tokens: int, *, seed: int, cached: bool, n_probs: int, force: int | None = None
    ) -> dict[str, Any]:
        body: dict[str, Any] = {
            "prompt": list(prompt),
            "n_predict": n_tokens,
            "seed": seed,
            "cache_prompt": cached,
            "n_probs": n_probs,
            "post_sampling_probs": False,
            "return_tokens": True,
            "ignore_eos": force is None,
            "stream": False,
            **_SAMPLERS,
        }
        if force is not None:
            body["logit_bias"] = [[force, _CERTAIN]]
        answer = self._client.post(self._url, body)
        if not isinstance(answer, dict):
            raise CaptureError(f"the answer to {self._where} is no JSON object")
        return answer


def scored_indices(n_tokens: int) -> tuple[int, ...]:
    """Return which of the generated tokens are scored: the first, and then ever more rarely, the last included.

    >>> scored_indices(32)
    (0, 1, 4, 16, 31)
    """
    picked = {0, n_tokens - 1}
    step = 1
    while step < n_tokens - 1:
        picked.add(step)
        step *= 4
    return tuple(sorted(i for i in picked if 0 <= i < n_tokens))
