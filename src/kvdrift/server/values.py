"""What a server was asked and what it answered: prompts, generations and scores, as plain values.

A token is its id where the server tells ids, and its text where it does not. Logprobs are natural logarithms; NaN and
infinite ones are kept as they came.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Token = int | str
Tops = Mapping[Token, float]
Cache = Literal["cold", "warm"]

# How a sequence was computed. The reference is `prefill`: prompt and generated tokens together, alone on the server.
DECODE_SOLO = "decode_solo"
DECODE_REPEAT = "decode_repeat"
DECODE_WARM = "decode_warm"
DECODE_FEW = "decode_few"
DECODE_BATCHED = "decode_batched"
PREFILL = "prefill"
PREFILL_REPEAT = "prefill_repeat"
PREFILL_LONGER = "prefill_longer"
PREFILL_BATCHED = "prefill_batched"
# A prefill on top of rows that another prefill has left in the prefix cache, by several tokens, and by one a request:
# the step of decode without its loop. `GENERATION` is decode alone against those same steps.
PREFILL_PARTS = "prefill_parts"
FORCED = "forced_steps"
FORCED_REPEAT = "forced_repeat"
GENERATION = "decode_against_forced"
AGAINST = "other_server"
SPOILED = "spoiled_prompt"

DECODES = (DECODE_SOLO, DECODE_REPEAT, DECODE_WARM, DECODE_BATCHED)
# Why a generation may be shorter than asked without anything being amiss: all of it is compared.
ENDED = "the model ended the text"
CUT = "the server gives no logprobs of tokens that are parts of a character"
# `DECODE_FEW` has so few rows in flight that they must not move each other at all; it is judged by that alone.
# Decode with nothing else on the server and nothing cached: where an error shows best.
ALONE = (DECODE_SOLO, DECODE_REPEAT)
PREFILLS = (PREFILL_REPEAT, PREFILL_LONGER, PREFILL_PARTS, PREFILL_BATCHED)
ROUTE_TEXT = {
    DECODE_SOLO: "decode, alone",
    DECODE_REPEAT: "decode, the same request again",
    DECODE_WARM: "decode, prefix cache warm",
    DECODE_FEW: "decode, few neighbours in flight",
    DECODE_BATCHED: "decode, neighbours in flight",
    PREFILL: "prefill, alone",
    PREFILL_REPEAT: "prefill, the same request again",
    PREFILL_LONGER: "prefill, more tokens appended",
    PREFILL_BATCHED: "prefill, neighbours in flight",
    PREFILL_PARTS: "prefill, in two parts on the prefix cache",
    FORCED: "forced tokens, one a request on the prefix cache",
    FORCED_REPEAT: "the same forced token again",
    GENERATION: "decode, alone, against the same tokens forced",
    AGAINST: "prefill, against the other server",
    SPOILED: "prefill, one prompt token replaced",
}


@dataclass(frozen=True, slots=True)
class ServedPrompt:
    """A prompt, as ids or, where the server takes no ids, as text; `n_tokens` counts its tokens, BOS included."""

    name: str
    ids: tuple[int, ...] | None
    text: str | None
    n_tokens: int


@dataclass(frozen=True, slots=True)
class ServedTokens:
    """Tokens that the server has decoded.

    Attributes:
        tokens: what was sampled.
        logprobs: of each token when it was sampled.
        gaps: most likely token over the runner-up, in nats, None where the server does not tell.
        n_cached: prompt tokens that the server says it took from its prefix cache, None if it does not say.
        ended: whether the model stopped by itself before the span was full.
        cut: whether what follows is not told, because the server has no logprob of a token that is part of a character.
        tops: logprobs of the likeliest tokens at each step by their ids, as far as the server tells them.
    """

    tokens: tuple[Token, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float | None, ...]
    n_cached: int | None = None
    ended: bool = False
    cut: bool = False
    tops: tuple[Tops, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """Logprobs of given tokens as part of a prompt.

    `logprobs` has an entry for each generated token, None for one that was not scored. `n_computed` is how many prompt
    tokens the server says that it has computed for this answer, None if it does not say. `tokens` is what the server
    took the generated tokens for. `tops` are as for `ServedTokens`.
    """

    tokens: tuple[Token, ...]
    logprobs: tuple[float | None, ...]
    n_computed: int | None = None
    tops: tuple[Tops, ...] = ()


@dataclass(frozen=True, slots=True)
class Walked:
    """The scores of one generation by all ways of prefill that a server with a prefix cache for everybody has.

    Attributes:
        fresh: on a cold cache, at some of the tokens: the reference.
        forced: one token a request, each on top of what the requests before have left; the first by a prefill.
        repeat: one of the forced tokens once more, on the same rows.
        parts: some tokens at once on top of a fresh prefill.
        why_not: why nothing was forced, None where it was.
    """

    fresh: Score
    forced: Score | None = None
    repeat: Score | None = None
    parts: Score | None = None
    why_not: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobPair:
    """Two logprobs of one token after one prefix, by two routes.

    `index` counts generated tokens from 0; `position` is the token's place in the whole sequence. `reference` is the
    prefill's. `spread` is the rms difference over all tokens whose logprobs both answers tell, None if they tell one.
    """

    prompt: str
    route: str
    index: int
    position: int
    token: Token
    value: float
    reference: float
    gap: float | None = None
    spread: float | None = None

    @property
    def size(self) -> float:
        """How far the two answers lie apart, in nats: over all tokens that both tell, else over the one."""
        return abs(self.drift) if self.spread is None else self.spread

    @property
    def drift(self) -> float:
        """The logprob by this route less that of the prefill, in nats; NaN or infinite if either side is."""
        return self.value - self.reference


@dataclass(slots=True)
class Captured:
    """Everything measured on one server.

    Attributes:
        pairs: by route, prefill variants and the positive control among them.
        decode_noise: differences of two decode routes at equal prefixes, by the two routes.
        n_asked: tokens asked for, over all decode routes.
        n_unpaired: generated tokens whose score could not be had, by reason.
        failures: routes that could not be run, with the reason.
        absent: routes that this server does not offer, with the reason.
        power: what this audit can see, said before its first request.
        same_build: whether a second server was named that tells the same kind, version and weights.
        n_computed_all: whether every scored prompt was computed as a whole, by the server's own word; None if it gave
            none.
        n_cached: prefix-cache hits that the server reported, by route; absent where it reported nothing.
    """

    prompts: list[ServedPrompt] = field(default_factory=list)
    pairs: list[LogprobPair] = field(default_factory=list)
    decode_noise: dict[tuple[str, str], list[LogprobPair]] = field(default_factory=dict)
    n_asked: int = 0
    n_unpaired: dict[str, int] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    power: str = ""
    same_build: bool = False
    n_computed_all: bool | None = None
    n_cached: dict[str, int] = field(default_factory=dict)
    n_requests: int = 0

    def lost(self, reason: str, count: int = 1) -> None:
        """Count tokens without a partner."""
        if count:
            self.n_unpaired[reason] = self.n_unpaired.get(reason, 0) + count


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerFacts:
    """What is known of a server. `offers` and `lacks` are sentences for the report; a fact nobody tells is None.

    `quantised` says that the engine rounds activations to 8 bits in its matrix products, whatever its dtype is, and
    `cache_dtype` what its cache holds unless it was started otherwise. `finest` says how to start it so that it rounds
    least, `changes` names flags that change one thing each.
    """

    dialect: str
    url: str
    model: str
    dtype: str | None = None
    dtype_from: str | None = None
    version: str | None = None
    quantised: bool | None = None
    weights: str | None = None
    n_slots: int | None = None
    cache_dtype: str | None = None
    finest: str = "serve the model in float32"
    changes: str = "prefix cache off, one request at a time, float32, another attention backend"
    offers: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
