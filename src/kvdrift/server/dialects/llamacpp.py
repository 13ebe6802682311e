"""llama.cpp's own server (`llama-server`), by its native /completion.

It has no prompt logprobs. A token is scored by prefilling everything in front of it, with `cache_prompt` off, and
asking for one token, which a logit bias forces to be the wanted one: reported logprobs are taken before sampling and
before the bias. That is one request for each scored token, so only some tokens of a generation are scored.

With `cache_prompt` on, a prompt that is one token longer than the last one of its slot is computed as a single row on
top of what is cached: the very step of decode, asked for from outside (`walk`). The server says how many tokens it has
computed, which proves that it was that step. `id_slot` keeps these requests on one slot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvdrift.errors import CaptureError
from kvdrift.server.client import Client
from kvdrift.server.dialects.answers import Part, ask_quietly, text_or_none
from kvdrift.server.dialects.base import PLAIN_SAMPLING, IdDialect, dtype_facts, ids_of
from kvdrift.server.values import Cache, Score, ServedPrompt, ServedTokens, ServerFacts, Token, Tops, Walked

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
# How many of the likeliest tokens are asked for: each is one more look at the same hidden state.
_TOPS = 16
# The types of weights that files name and that are no quantisation, in kvdrift's words.
_PLAIN_WEIGHTS = {"all F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class _Next:
    """What a server said of the token after a prompt; `n_computed` prompt tokens were not taken from its cache."""

    logprob: float
    tops: Tops
    n_computed: int | None


class LlamaCpp(IdDialect):
    """Speaks to llama-server."""

    path = "/completion"
    can_append = False
    forces = True

    @classmethod
    def recognise(cls, client: Client, model: str, dtype: str | None) -> LlamaCpp | None:
        """Recognise llama.cpp by its /props, which name the type of the weights and the number of slots."""
        props = ask_quietly(client, "GET", f"{client.root}/props")
        if "default_generation_settings" not in props:
            return None
        weights = text_or_none(client, props.get("model_ftype"))
        plain = _PLAIN_WEIGHTS.get(weights or "")
        slots = props.get("total_slots")
        lacks = ["logprobs of a whole prompt: tokens are scored one request each, and only some of them"]
        if slots == 1:
            lacks.append("a second slot (--parallel): it serves one request after another, neighbours change nothing")
        facts = ServerFacts(
            dialect="llama.cpp",
            url=client.root,
            model=model,
            **(dtype_facts(dtype) if dtype or plain is None else {"dtype": plain, "dtype_from": "the server"}),
            version=text_or_none(client, props.get("build_info")),
            weights=weights,
            n_slots=slots if isinstance(slots, int) else None,
            quantised=None if weights is None and dtype is None else weights is not None and plain is None,
            cache_dtype="float16",
            finest=(
                "start llama-server with --flash-attn on --parallel 1, and best with a float32 file (convert with "
                "--outtype f32) and --cache-type-k f32 --cache-type-v f32"
            ),
            changes=(
                "--no-cache-prompt, --parallel 1, --flash-attn off, --cache-type-k f32 --cache-type-v f32, "
                "--ubatch-size 32"
            ),
            offers=(
                "token ids in both directions",
                "logprobs of the next token after any prompt",
                "cache_prompt on or off",
                "the number of prompt tokens that it has computed",
            ),
            lacks=tuple(lacks),
        )
        dialect = cls(client, facts)
        dialect.batches = slots != 1
        return dialect

    def score_requests(self, n_tokens: int) -> int:
        """Return how many tokens are scored, each by its own request."""
        return len(_checked(n_tokens))

    def walk_requests(self, n_tokens: int, *, whole: bool) -> int:
        """Return how many requests a `walk` along `n_tokens` generated tokens takes."""
        return 1 + len(_steps(n_tokens, whole)) + (1 + len(_order(n_tokens)) if whole else 0)

    def tokenize(self, name: str, text: str) -> tuple[int, ...]:
        """Return the ids that /tokenize makes of a text, BOS included where the model has one."""
        body = {"content": text, "add_special": True, "parse_special": True}
        return self._post(body, "/tokenize")["tokens"].ids()

    def generate(self, prompt: ServedPrompt, n_tokens: int, *, seed: int, cache: Cache) -> ServedTokens:
        """Sample `n_tokens` tokens, past the end of the text if need be."""
        answer = self._ask(ids_of(prompt), n_tokens, seed=seed, cached=cache == "warm", n_probs=_TOPS)
        tokens = answer["tokens"].ids()
        steps = answer["completion_probabilities"].items()
        agreed = next(
            (i for i, (s, t) in enumerate(zip(steps, tokens, strict=False)) if s["id"].value != t), len(steps)
        )
        # It leaves out the logprobs of tokens that are a part of a character; what follows such a one has no place.
        cut = agreed < len(tokens) and len(steps) < len(tokens)
        if agreed < len(tokens) and not cut:
            raise answer.error(f"gives token {agreed} two ids; its logprobs cannot be placed")
        tokens, steps = tokens[:agreed], steps[:agreed]
        return self._generation(
            tokens,
            [step["logprob"] for step in steps],
            [[t.get("logprob") for t in step.listed("top_logprobs") if isinstance(t, dict)] for step in steps],
            n_cached=answer.count("timings", "cache_n"),
            ended=answer.find("stop_type") == "eos",
            likeliest=[_tops(step) for step in steps],
            cut=cut,
        )

    def score(
        self, prompt: ServedPrompt, tokens: Sequence[Token], *, appended: Sequence[int] = (), cache: Cache = "cold"
    ) -> Score:
        """Score two of the tokens, each as what follows a freshly prefilled prefix."""
        assert not appended, "a next-token score has nothing behind it"
        given = tuple(int(t) for t in tokens)
        return _score(prompt, given, {i: self._next(prompt, given, i, cache) for i in _checked(len(given))})

    def score_all(self, prompt: ServedPrompt, tokens: Sequence[Token]) -> Score:
        """Score every token, each as what follows a freshly prefilled prefix."""
        given = tuple(int(t) for t in tokens)
        return _score(prompt, given, {i: self._next(prompt, given, i, "cold") for i in range(len(given))})

    def score_all_requests(self, n_tokens: int) -> int:
        """Return one request a token."""
        return n_tokens

    def walk(self, prompt: ServedPrompt, tokens: Sequence[Token], *, whole: bool) -> Walked:
        """Force the first tokens one by one, then score them and later ones afresh and in parts; see `Walked`.

        The order is what makes each prefix cache right: a part follows a fresh prefill of what it stands on.
        """
        given = tuple(int(t) for t in tokens)
        steps = _steps(len(given), whole)
        forced = {0: self._next(prompt, given, 0, "cold", slot=0)}
        forced |= {i: self._next(prompt, given, i, "warm", slot=0) for i in steps}
        why_not = self._unforced(prompt, forced, steps)
        if not whole:
            first = _score(prompt, given, {0: forced[0]})
            return Walked(first, None if why_not else _score(prompt, given, forced), why_not=why_not)
        # Its rows are still cached; only the last one is computed again.
        again = {i: self._next(prompt, given, i, "warm", slot=0) for i in steps[:1]}
        fresh = {0: forced[0]}
        parts: dict[int, _Next] = {}
        for i, cache in _order(len(given)):
            (parts if cache == "warm" else fresh)[i] = self._next(prompt, given, i, cache, slot=0)
        proven = why_not is None
        return Walked(
            _score(prompt, given, fresh),
            _score(prompt, given, forced) if proven else None,
            _score(prompt, given, again) if proven else None,
            _score(prompt, given, parts) if proven else None,
            why_not,
        )

    def _unforced(self, prompt: ServedPrompt, forced: dict[int, _Next], steps: Sequence[int]) -> str | None:
        """Return why the forced tokens are not single rows on a cache, None if they are."""
        computed = [forced[i].n_computed for i in steps]
        if all(n == 1 for n in computed):
            return None
        if None in computed:
            return "the server does not say how many prompt tokens it computed, so that no single step can be proven"
        return (
            f"asked for one more token on top of its prefix cache, the server computed {max(n or 0 for n in computed)} "
            "(prefix cache off, or a model whose window or state cannot go on: --cache-prompt, --swa-full)"
        )

    def _next(
        self, prompt: ServedPrompt, tokens: Sequence[int], index: int, cache: Cache, *, slot: int | None = None
    ) -> _Next:
        """Return what the server says of one token of a generation, as what follows all those in front of it."""
        whole, token = ids_of(prompt, tokens[:index]), tokens[index]
        answer = self._ask(whole, 1, seed=0, cached=cache == "warm", n_probs=_TOPS, force=token, slot=slot)
        step = answer["completion_probabilities"][0]
        if step["id"].value != token:
            raise CaptureError(f"{self._where} ignores logit_bias, so the token {token} cannot be scored there")
        return _Next(step["logprob"].logprob(), _tops(step), answer.count("timings", "prompt_n"))

    def _ask(
        self,
        prompt: Sequence[int],
        n_tokens: int,
        *,
        seed: int,
        cached: bool,
        n_probs: int,
        force: int | None = None,
        slot: int | None = None,
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
        if slot is not None:
            body["id_slot"] = slot
        return self._post(body)


def _steps(n_tokens: int, whole: bool) -> tuple[int, ...]:
    """Return which tokens are forced, one row each. What decode does beyond a step begins with the first of them."""
    return tuple(range(1, min(n_tokens, 4 if whole else 3)))


def _order(n_tokens: int) -> tuple[tuple[int, Cache], ...]:
    """Return which tokens are scored in which order: "cold" afresh, "warm" in one part on top of the score before.

    >>> _order(32)
    ((1, 'cold'), (3, 'warm'), (2, 'cold'), (3, 'cold'), (12, 'cold'), (31, 'warm'), (31, 'cold'))
    """
    order: list[tuple[int, Cache]] = [(i, "cold") for i in _steps(n_tokens, True)]
    if len(order) > 2:
        order.insert(1, (3, "warm"))
    middle, last = 3 * n_tokens // 8, n_tokens - 1
    if middle > 3:
        order.append((middle, "cold"))
    if last > 3:
        order += [(last, "warm"), (last, "cold")]
    return tuple(order)


def _checked(n_tokens: int) -> tuple[int, ...]:
    """Return which tokens are scored where two must do.

    >>> _checked(32), _checked(2)
    ((1, 31), (1,))
    """
    return tuple(i for i in dict.fromkeys((min(1, n_tokens - 1), n_tokens - 1)) if i >= 0)


def _tops(step: Part) -> Tops:
    """Return the logprobs of the likeliest tokens by their ids, as far as they are told."""
    found: dict[Token, float] = {}
    for item in step.listed("top_logprobs"):
        token, value = (item.get("id"), item.get("logprob")) if isinstance(item, dict) else (None, None)
        if isinstance(token, int) and isinstance(value, int | float) and not isinstance(value, bool):
            found[token] = float(value)
    return found


def _score(prompt: ServedPrompt, tokens: tuple[int, ...], found: dict[int, _Next]) -> Score:
    """Return some next tokens as a score of the generation, None for those that were not asked for."""
    at = [found.get(i) for i in range(len(tokens))]
    missing: int | None = None  # prefix tokens that some request did not compute, None if the server never told
    for i, said in found.items():
        if said.n_computed is not None:
            missing = max(missing or 0, prompt.n_tokens + i - said.n_computed)
    return Score(
        tokens,
        tuple(None if said is None else said.logprob for said in at),
        None if missing is None else prompt.n_tokens + len(tokens) - missing,
        tuple({} if said is None else said.tops for said in at),
    )
