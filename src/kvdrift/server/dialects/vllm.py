"""vLLM's OpenAI-compatible server: `prompt_logprobs`, token ids in both directions, a salt for the prefix cache.

Habits that matter:

* A request with `prompt_logprobs` does not read the prefix cache, so only decode routes can meet a warm one.
* `logprobs` is capped by the server (20 by default); one more than the sampled token is enough here.
* `max_tokens=0` is refused without `echo`; a score therefore asks for one token and ignores it.
* Logprobs below -9999 are cut off there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError, EngineUnavailable
from kvdrift.server.client import Client
from kvdrift.server.dialects.answers import Part, ask_quietly, text_or_none
from kvdrift.server.dialects.base import PLAIN_SAMPLING, IdDialect, dtype_facts, ids_of
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token

_SAMPLING = {**PLAIN_SAMPLING, "top_k": 0, "repetition_penalty": 1.0}
# What an answer to the first request must hold, and what it is to the user.
_NEEDED = {
    "token_ids": "the ids of generated tokens (return_token_ids)",
    "prompt_logprobs": "the logprobs of a prompt (prompt_logprobs)",
    "logprobs": "logprobs of generated tokens (logprobs)",
}


class Vllm(IdDialect):
    """Speaks to vLLM, and to servers that took over its parameters."""

    path = "/v1/completions"

    @classmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> Vllm:
        """Try one small request, whose answer says whether this server can be audited at all.

        Raises:
            EngineUnavailable: it does not give what an audit needs. No other dialect is left to try.
        """
        url = f"{client.root}{cls.path}"
        body = {"model": model, "prompt": [1, 2, 3], "max_tokens": 1}
        answer = client.probe("POST", url, body | {"logprobs": 1, "prompt_logprobs": 0, "return_token_ids": True})
        if answer.status >= 400:
            raise client.error("POST", url, answer)
        try:
            choice = Part(answer.body, f"POST {url}")["choices"][0]
        except CaptureError:
            choice = Part({}, f"POST {url}")
        missing = [text for name, text in _NEEDED.items() if not isinstance(choice.find(name), list | dict)]
        if missing:
            raise EngineUnavailable(
                f"the server at {client.api} does not give {', nor '.join(missing)}; kvdrift can audit vLLM, SGLang, "
                "llama.cpp and llama-cpp-python, or saved traces (kvdrift judge)"
            )
        facts = ServerFacts(
            dialect="vLLM",
            url=client.api,
            model=model,
            **dtype_facts(dtype),
            version=text_or_none(client, ask_quietly(client, "GET", f"{client.root}/version").get("version")),
            offers=("token ids in both directions", "prompt_logprobs", "a salt for the prefix cache (cache_salt)"),
            finest="start vLLM with --dtype float32",
            changes="--no-enable-prefix-caching, --max-num-seqs 1, --enforce-eager, --dtype float32",
            lacks=("its dtype: name it with --dtype",) if dtype is None else (),
            notes=("A request with prompt_logprobs does not read the prefix cache; decode routes do.",),
        )
        return cls(client, facts)

    def tokenize(self, name: str, text: str) -> tuple[int, ...]:
        """Return the ids of a prompt that the server answers with."""
        choice, _ = self._ask(text, 1, salt=self._salt("cold", name), return_token_ids=True)
        return choice["prompt_token_ids"].ids()

    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        choice, answer = self._ask(
            list(ids_of(prompt)),
            n_tokens,
            salt=self._salt(cache, prompt.name),
            seed=seed,
            logprobs=2,
            return_token_ids=True,
            return_tokens_as_token_ids=True,
            ignore_eos=True,
        )
        n_cached = answer.count("usage", "prompt_tokens_details", "cached_tokens")
        return self._completion(choice, choice["token_ids"].ids(), n_cached=n_cached)

    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score tokens by the logprobs of a prompt that holds them."""
        whole = ids_of(prompt, tokens, appended)
        salt = self._salt(cache, prompt.name)
        choice, _ = self._ask(list(whole), 1, salt=salt, prompt_logprobs=0, return_token_ids=True)
        scores = choice["prompt_logprobs"].items()
        if len(scores) != len(whole):
            raise choice.error(f"has {len(scores)} prompt logprobs for {len(whole)} tokens")
        if choice.find("prompt_token_ids") is not None and choice["prompt_token_ids"].ids() != whole:
            raise CaptureError(f"{self._where} changed the token ids that it was given; they must be taken as they are")
        entries = zip(scores[prompt.n_tokens :], tokens, strict=False)
        return Score(tuple(tokens), tuple(entry[str(token)]["logprob"].logprob() for entry, token in entries), None)

    def _ask(self, prompt: str | list[int], n_tokens: int, *, salt: str, **options: Any) -> tuple[Part, Part]:
        """Return the first choice of the answer, and the whole answer."""
        body = {"model": self.facts.model, "prompt": prompt, "max_tokens": n_tokens, "cache_salt": salt}
        answer = self._post(body | _SAMPLING | options)
        return answer["choices"][0], answer
