"""SGLang's native `/generate`: `return_logprob` with `logprob_start_len`, token ids in both directions.

Habits that matter:

* Tokens before `logprob_start_len` may come out of the radix cache, those behind it are computed. A score starts at 0.
* `cache_salt` keeps the cache of one request apart from all others. Flushing the whole cache, as SGLang's own tests do,
  would hurt everybody else on the server.
* `sampling_seed` is honoured only when the server samples deterministically; without it two samples differ, and each
  is scored by itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kvdrift.errors import CaptureError
from kvdrift.server.client import Client
from kvdrift.server.dialects.answers import Part, ask_quietly, text_or_none
from kvdrift.server.dialects.base import PLAIN_SAMPLING, IdDialect, dtype_facts, ids_of
from kvdrift.server.plan import dtype_name
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token

_SAMPLING = {**PLAIN_SAMPLING, "top_k": -1, "repetition_penalty": 1.0, "ignore_eos": True}


class Sglang(IdDialect):
    """Speaks to SGLang's own endpoint, which lies beside /v1."""

    path = "/generate"

    @classmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> Sglang | None:
        """Recognise SGLang by its /server_info."""
        info = ask_quietly(client, "GET", f"{client.root}/server_info")
        if "disable_radix_cache" not in info and "internal_states" not in info:
            return None
        said = dtype_name(info["dtype"]) if isinstance(info.get("dtype"), str) else None
        lacks = []
        if info.get("disable_radix_cache") is True:
            lacks.append("a prefix cache: it is switched off, so a warm one was not tested")
        if info.get("quantization"):
            lacks.append("plain weights: they are quantised, and kernels may round activations as well")
        facts = ServerFacts(
            dialect="SGLang",
            url=client.root,
            model=model,
            **(dtype_facts(dtype) if dtype or not said else {"dtype": said, "dtype_from": "the server"}),
            version=text_or_none(client, info.get("version")),
            quantised=bool(info.get("quantization")),
            finest="start SGLang with --dtype float32",
            changes=(
                "--disable-radix-cache, --max-running-requests 1, --disable-cuda-graph, --dtype float32, "
                "--attention-backend"
            ),
            offers=("token ids in both directions", "input logprobs (logprob_start_len)", "a salt for the radix cache"),
            lacks=tuple(lacks),
            notes=("Sampling seeds are honoured only if the server was started for deterministic sampling.",),
        )
        return cls(client, facts)

    def tokenize(self, name: str, text: str) -> tuple[int, ...]:
        """Return the ids of a text, read off its input logprobs."""
        meta = self._ask({"text": text}, 1, seed=0, salt=self._salt("cold", name), start=0)
        return tuple(item[1].id() for item in meta["input_token_logprobs"].items())

    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        asked = {"input_ids": list(ids_of(prompt))}
        meta = self._ask(asked, n_tokens, seed=seed, salt=self._salt(cache, prompt.name), start=-1, tops=2)
        steps = meta["output_token_logprobs"].items()
        tops = meta.listed("output_top_logprobs") or [None] * len(steps)
        return self._generation(
            [step[1].id() for step in steps],
            [step[0] for step in steps],
            [[item[0] for item in top if item] if isinstance(top, list) else [] for top in tops],
            n_cached=meta.count("cached_tokens"),
            ended=meta.find("finish_reason", "type") == "stop",
        )

    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score tokens by the input logprobs of a prompt that holds them."""
        whole = ids_of(prompt, tokens, appended)
        meta = self._ask({"input_ids": list(whole)}, 1, seed=0, salt=self._salt(cache, prompt.name), start=0)
        items = meta["input_token_logprobs"].items()
        if tuple(item[1].id() for item in items) != whole:
            raise CaptureError(f"{self._where} scored {len(items)} tokens, and not the {len(whole)} that it was given")
        part = items[prompt.n_tokens : prompt.n_tokens + len(tokens)]
        n_cached = meta.count("cached_tokens")
        n_computed = None if n_cached is None else len(whole) - n_cached
        return Score(tuple(tokens), tuple(item[0].logprob() for item in part), n_computed)

    def _ask(self, prompt: dict[str, Any], n_tokens: int, *, seed: int, salt: str, start: int, tops: int = 0) -> Part:
        answer = self._post(
            {
                **prompt,
                "sampling_params": {**_SAMPLING, "max_new_tokens": n_tokens, "sampling_seed": seed},
                "return_logprob": True,
                "logprob_start_len": start,
                "top_logprobs_num": tops,
                "cache_salt": salt,
            }
        )
        return answer["meta_info"]
