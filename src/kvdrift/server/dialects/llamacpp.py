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
from kvdrift.server.dialects.answers import Part, ask_quietly, text_or_none
from kvdrift.server.dialects.base import PLAIN_SAMPLING, IdDialect, dtype_facts, ids_of
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token

_SAMPLING = {
    **PLAIN_SAMPLING,
    "samplers": ["temperature"],
    "top_k": 0,
    "typical_p": 1.0,
    "repeat_penalty": 1.0,
    "dry_multiplier": 0.0,
    "xtc_probability": 0.0,
    "mirostat": 0,
    "dynatemp_range": 0.0,
}
# Large enough to make any token certain, small enough to stay finite in float16.
_CERTAIN = 10000.0


class LlamaCpp(IdDialect):
    """Speaks to llama-server."""

    path = "/completion"
    can_append = False

    @classmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> LlamaCpp | None:
        """Recognise llama.cpp by its /props."""
        props = ask_quietly(client, "GET", f"{client.root}/props")
        if "default_generation_settings" not in props:
            return None
        facts = ServerFacts(
            dialect="llama.cpp",
            url=client.root,
            model=model,
            **dtype_facts(dtype),
            version=text_or_none(client, props.get("build_info")),
            quantised=None if dtype is None else False,
            offers=(
                "token ids in both directions",
                "logprobs of the next token after any prompt",
                "cache_prompt on or off",
            ),
            lacks=("logprobs of a whole prompt: tokens are scored one request each, and only some of them",),
        )
        return cls(client, facts)

    def score_requests(self, n_tokens: int) -> int:
        """Return how many tokens are scored, each by its own request."""
        return len(scored_indices(n_tokens))

    def tokenize(self, name: str, text: str) -> tuple[int, ...]:
        """Return the ids that /tokenize makes of a text, BOS included where the model has one."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._post(body, "/tokenize")["tokens"].ids()

    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        answer = self._ask(ids_of(prompt), n_tokens, seed=seed, cached=cache == "warm", n_probs=2)
        tokens = answer["tokens"].ids()
        steps = answer["completion_probabilities"].items()
        for i, (step, token) in enumerate(zip(steps, tokens, strict=False)):
            if step["id"].value != token:
                raise answer.error(f"gives token {i} two ids; its logprobs cannot be placed")
        return self._generation(
            tokens,
            [step["logprob"] for step in steps],
            [[t.get("logprob") for t in step.listed("top_logprobs") if isinstance(t, dict)] for step in steps],
            n_cached=answer.count("timings", "cache_n"),
            ended=answer.find("stop_type") == "eos",
        )

    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score some of the tokens, each as what follows a freshly prefilled prefix."""
        assert not appended, "a next-token score has nothing behind it"
        given = tuple(int(t) for t in tokens)
        values: list[float | None] = [None] * len(given)
        missing: int | None = None  # prefix tokens that some request did not compute, None if the server never told
        for i in scored_indices(len(given)):
            whole = ids_of(prompt, given[:i])
            answer = self._ask(whole, 1, seed=0, cached=cache == "warm", n_probs=1, force=given[i])
            step = answer["completion_probabilities"][0]
            if step["id"].value != given[i]:
                raise CaptureError(f"{self._where} ignores logit_bias, so the token {given[i]} cannot be scored there")
            values[i] = step["logprob"].logprob()
            done = answer.count("timings", "prompt_n")
            if done is not None:
                missing = max(missing or 0, len(whole) - done)
        n_computed = None if missing is None else prompt.n_tokens + len(given) - max(0, missing)
        return Score(given, tuple(values), n_computed)

    def _ask(
        self, prompt: Sequence[int], n_tokens: int, *, seed: int, cached: bool, n_probs: int, force: int | None = None
    ) -> Part:
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
            **_SAMPLING,
        }
        if force is not None:
            body["logit_bias"] = [[force, _CERTAIN]]
        return self._post(body)


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
