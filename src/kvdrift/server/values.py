"""What a server was asked and what it answered: prompts, generations and scores, as plain values.

A token is its id where the server tells ids, and its text where it does not. Logprobs are natural logarithms; NaN and
infinite ones are kept as they came.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Token = int | str
Cache = Literal["cold", "warm"]

# How a sequence was computed. The reference is `prefill`: prompt and generated tokens together, alone on the server.
DECODE_SOLO = "decode_solo"
DECODE_REPEAT = "decode_repeat"
DECODE_WARM = "decode_warm"
DECODE_BATCHED = "decode_batched"
PREFILL = "prefill"
PREFILL_REPEAT = "prefill_repeat"
PREFILL_LONGER = "prefill_longer"
PREFILL_BATCHED = "prefill_batched"
SPOILED = "spoiled_prompt"

DECODES = (DECODE_SOLO, DECODE_REPEAT, DECODE_WARM, DECODE_BATCHED)
PREFILLS = (PREFILL_REPEAT, PREFILL_LONGER, PREFILL_BATCHED)
ROUTE_TEXT = {
    DECODE_SOLO: "decode, alone",
    DECODE_REPEAT: "decode, the same request again",
    DECODE_WARM: "decode, prefix cache warm",
    DECODE_BATCHED: "decode, neighbours in flight",
    PREFILL: "prefill, alone",
    PREFILL_REPEAT: "prefill, the same request again",
    PREFILL_LONGER: "prefill, more tokens appended",
    PREFILL_BATCHED: "prefill, neighbours in flight",
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
    """

    tokens: tuple[Token, ...]
    logprobs: tuple[float, ...]
    gaps: tuple[float | None, ...]
    n_cached: int | None = None
    ended: bool = False


@dataclass(frozen=True, slots=True)
class Score:
    """Logprobs of given tokens as part of a prompt.

    `logprobs` has an entry for each generated token, None for one that was not scored. `n_computed` is how many prompt
    tokens the server says that it has computed for this answer, None if it does not say. `tokens` is what the server
    took the generated tokens for.
    """

    tokens: tuple[Token, ...]
    logprobs: tuple[float | None, ...]
    n_computed: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LogprobPair:
    """Two logprobs of one token after one prefix, by two routes.

    `index` counts generated tokens from 0; `position` is the token's place in the whole sequence. `reference` is the
    prefill's.
    """

    prompt: str
    route: str
    index: int
    position: int
    token: Token
    value: float
    reference: float
    gap: float | None = None

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

    `quantised` says that the engine rounds activations to 8 bits in its matrix products, whatever its dtype is.
    """

    dialect: str
    url: str
    model: str
    dtype: str | None = None
    dtype_from: str | None = None
    version: str | None = None
    quantised: bool | None = None
    offers: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
