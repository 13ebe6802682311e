"""Runs a server through its routes and pairs what comes back. It knows requests and tokens, and nothing of noise.

The order of requests is part of the measurement: a request alone comes before its neighbours, a cold cache before a
warm one, and a score never directly after the generation that it scores.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

from kvdrift.errors import CaptureError, UsageError
from kvdrift.server.client import BudgetSpent, Client
from kvdrift.server.dialects.base import Dialect
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import (
    DECODE_BATCHED,
    DECODE_REPEAT,
    DECODE_SOLO,
    DECODE_WARM,
    PREFILL_BATCHED,
    PREFILL_LONGER,
    PREFILL_REPEAT,
    SPOILED,
    Cache,
    Captured,
    LogprobPair,
    Score,
    ServedPrompt,
    ServedTokens,
    Token,
)
from kvdrift.vocabulary.progress import Progress

# Tokens put behind the scored ones to change the length, and with it the shape of every matrix product.
_APPENDED = 19


def capture_server(
    dialect: Dialect,
    client: Client,
    plan: ServerPlan,
    prompts: Mapping[str, str | Sequence[int]],
    progress: Progress,
) -> Captured:
    """Send everything, and return the pairs.

    Raises:
        UsageError: the bound on requests is too low for two prompts.
        CaptureError: the server failed on a request that nothing can be said without.
    """
    captured = Captured()
    names, extras = _affordable(dialect, client, plan, list(prompts), captured)
    # A step for each request in sight; own scores of diverging routes come on top.
    progress.start(len(names) * (8 + len(extras)))
    for name in names:
        progress.step(f"{name}: its tokens")
        captured.prompts.append(dialect.prepare(name, prompts[name]))
    run = _Run(dialect, plan, captured, progress)
    try:
        run.solo_routes()
        run.attempt(DECODE_REPEAT, run.decode_alone, DECODE_REPEAT, "cold")
        run.attempt(SPOILED, run.score_spoiled)
        run.attempt(DECODE_WARM, run.decode_alone, DECODE_WARM, "warm")
        if dialect.batches:
            run.attempt(DECODE_BATCHED, run.decode_together)
        for route in (PREFILL_LONGER, PREFILL_REPEAT, PREFILL_BATCHED):
            if route in extras:
                run.attempt(route, run.score_again, route)
    except BudgetSpent as error:
        captured.failures["requests"] = str(error)
    run.compare_decodes()
    captured.n_requests = client.n_requests
    return captured


def _affordable(
    dialect: Dialect, client: Client, plan: ServerPlan, names: list[str], captured: Captured
) -> tuple[list[str], tuple[str, ...]]:
    """Return the prompts and the additional prefill routes that the bound on requests has room for."""
    score = dialect.score_requests(plan.span)
    needed = 6 + 3 * score + (score if dialect.batches else 0)
    possible = [PREFILL_REPEAT]
    if dialect.can_append:
        possible.insert(0, PREFILL_LONGER)
    if dialect.batches:
        possible.append(PREFILL_BATCHED)
    extras = list(possible)
    while extras and len(names) * (needed + len(extras) * score) > client.n_left:
        extras.pop()
    n_prompts = min(len(names), client.n_left // (needed + len(extras) * score))
    if n_prompts < 2:
        raise UsageError(
            f"--max-requests {plan.max_requests} is too few: this server takes about {needed} requests per prompt, and "
            f"at least 2 prompts are needed; allow {client.n_requests + 2 * needed} (max_requests=...)"
        )
    enough = client.n_requests + len(names) * (needed + len(possible) * score)
    if n_prompts < len(names):
        captured.failures["requests"] = (
            f"only {n_prompts} of {len(names)} prompts fit into {plan.max_requests} requests; --max-requests {enough} "
            "has room for all"
        )
    if len(extras) < len(possible):
        captured.failures["self_noise"] = (
            f"{', '.join(r for r in possible if r not in extras)}: no requests left for these measures of noise; "
            f"--max-requests {enough} has room for all"
        )
    return names[:n_prompts], tuple(extras)


@dataclass(slots=True)
class _Run:
    """The requests of one audit, and what is known so far.

    Attributes:
        solo: the generation of each prompt alone on a cold cache.
        scores: by prompt and tokens; the first score of a sequence is the reference of every route that sampled it.
        decodes: generations by route and prompt.
    """

    dialect: Dialect
    plan: ServerPlan
    captured: Captured
    progress: Progress
    solo: dict[str, ServedTokens] = field(default_factory=dict)
    scores: dict[tuple[str, tuple[Token, ...]], Score] = field(default_factory=dict)
    decodes: dict[str, dict[str, ServedTokens]] = field(default_factory=lambda: defaultdict(dict))

    def attempt(self, route: str, action: Callable[..., None], *arguments: Any) -> None:
        """Run one route. The server's failure there is a missing route, not the end of the audit."""
        try:
            action(*arguments)
        except BudgetSpent:
            raise
        except CaptureError as error:
            self.captured.failures[route] = str(error)

    def solo_routes(self) -> None:
        """Decode every prompt alone, and score what came."""
        for number, prompt in enumerate(self.captured.prompts):
            self._say(prompt, "decode, alone")
            self.solo[prompt.name] = self._generate(number, prompt, "cold")
            self._keep(prompt, DECODE_SOLO, self.solo[prompt.name])
        # All generations come first: a score directly after its own generation may be answered from what decode has
        # left.
        for prompt in self.captured.prompts:
            self._say(prompt, "prefill, alone")
            generation = self.solo[prompt.name]
            if generation.tokens:
                self.scores[prompt.name, generation.tokens] = self.dialect.score(prompt, generation.tokens)
        for prompt in self.captured.prompts:
            self._pair(prompt, DECODE_SOLO, self.solo[prompt.name])

    def decode_alone(self, route: str, cache: Cache) -> None:
        """Decode every prompt alone once more; on a warm cache, after a request that fills it."""
        for number, prompt in enumerate(self.captured.prompts):
            self._say(prompt, f"decode, {'prefix cache warm' if cache == 'warm' else 'once more'}")
            if cache == "warm":
                self.dialect.generate(prompt, 1, seed=self.plan.seed + number, cache=cache)
            generation = self._generate(number, prompt, cache)
            self._keep(prompt, route, generation)
            if generation.n_cached is not None and cache == "warm":
                n_cached = self.captured.n_cached
                n_cached[route] = n_cached.get(route, 0) + generation.n_cached
            self._pair(prompt, route, generation)

    def decode_together(self) -> None:
        """Decode all prompts with neighbours in flight."""
        prompts = self.captured.prompts
        with ThreadPoolExecutor(self.plan.neighbours) as pool:
            generations = list(pool.map(lambda item: self._generate(item[0], item[1], "cold"), enumerate(prompts)))
        for prompt, generation in zip(prompts, generations, strict=True):
            self._say(prompt, "decode, neighbours in flight")
            self._keep(prompt, DECODE_BATCHED, generation)
            self._pair(prompt, DECODE_BATCHED, generation)

    def score_spoiled(self) -> None:
        """Score the generated tokens after a prompt with one token replaced: what one foreign row would do."""
        for prompt in self._with_tokens():
            self._say(prompt, "the positive control")
            spoiled = self.dialect.spoil(prompt)
            if spoiled is not None:
                self._pair_score(prompt, SPOILED, self.dialect.score(spoiled, self.solo[prompt.name].tokens))

    def score_again(self, route: str) -> None:
        """Score the generated tokens once more: as before, with more tokens behind them, or with neighbours."""
        prompts = self._with_tokens()
        if route == PREFILL_BATCHED:
            with ThreadPoolExecutor(self.plan.neighbours) as pool:
                scores = list(pool.map(self._score_solo, prompts))
            for prompt, score in zip(prompts, scores, strict=True):
                self._pair_score(prompt, route, score)
            return
        for prompt in prompts:
            self._say(prompt, "prefill, more appended" if route == PREFILL_LONGER else "prefill, once more")
            appended = self._appended(prompt) if route == PREFILL_LONGER else ()
            self._pair_score(prompt, route, self._score_solo(prompt, appended))

    def compare_decodes(self) -> None:
        """Compare decode routes with each other, token by token as long as they sampled the same ones."""
        for first, second in combinations(self.decodes, 2):
            pairs = []
            for prompt in self.captured.prompts:
                one, other = self.decodes[first].get(prompt.name), self.decodes[second].get(prompt.name)
                if one is None or other is None:
                    continue
                for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
                    if a != b:
                        break
                    pairs.append(_pair_of(prompt, second, i, a, other.logprobs[i], one.logprobs[i], one.gaps[i]))
            self.captured.decode_noise[first, second] = pairs

    def _say(self, prompt: ServedPrompt, what: str) -> None:
        self.progress.step(f"{prompt.name}: {what}")

    def _with_tokens(self) -> list[ServedPrompt]:
        return [prompt for prompt in self.captured.prompts if self.solo[prompt.name].tokens]

    def _appended(self, prompt: ServedPrompt) -> tuple[int, ...]:
        """Return tokens of the next prompt to put behind what is scored."""
        prompts = self.captured.prompts
        other = prompts[(prompts.index(prompt) + 1) % len(prompts)].ids or (0,)
        return tuple((other * _APPENDED)[:_APPENDED])

    def _score_solo(self, prompt: ServedPrompt, appended: Sequence[int] = ()) -> Score:
        return self.dialect.score(prompt, self.solo[prompt.name].tokens, appended=appended)

    def _generate(self, number: int, prompt: ServedPrompt, cache: Cache) -> ServedTokens:
        return self.dialect.generate(prompt, self.plan.span, seed=self.plan.seed + number, cache=cache)

    def _keep(self, prompt: ServedPrompt, route: str, generation: ServedTokens) -> None:
        """Keep a generation, and count the tokens that are missing.

        Raises:
            CaptureError: the server generated more tokens than it was asked for.
        """
        span = self.plan.span
        if len(generation.tokens) > span:
            raise CaptureError(f"the server generated {len(generation.tokens)} tokens, and {span} were asked for")
        self.captured.n_asked += span
        why = "the model ended the text" if generation.ended else "the server sent fewer tokens than asked"
        self.captured.lost(why, span - len(generation.tokens))
        self.decodes[route][prompt.name] = generation

    def _pair(self, prompt: ServedPrompt, route: str, generation: ServedTokens) -> None:
        """Pair a generation with the score of its own tokens, which is measured now if no other route had the same."""
        tokens = generation.tokens
        if not tokens:
            return
        key = (prompt.name, tokens)
        if key not in self.scores:
            self.scores[key] = self.dialect.score(prompt, tokens)
        score = self.scores[key]
        if score.n_computed is not None:
            whole = score.n_computed >= prompt.n_tokens + len(tokens)
            self.captured.n_computed_all = whole and self.captured.n_computed_all is not False
        for i, token in enumerate(tokens):
            if i >= len(score.tokens) or score.tokens[i] != token:
                self.captured.lost("prompt and generation were cut into different tokens", len(tokens) - i)
                break
            reference = score.logprobs[i]
            if reference is not None:  # otherwise not scored on purpose: the dialect takes a sample of positions
                pair = _pair_of(prompt, route, i, token, generation.logprobs[i], reference, generation.gaps[i])
                self.captured.pairs.append(pair)

    def _pair_score(self, prompt: ServedPrompt, route: str, score: Score) -> None:
        """Pair another score of the solo generation's tokens with the first one."""
        tokens = self.solo[prompt.name].tokens
        first = self.scores[prompt.name, tokens]
        for i, token in enumerate(tokens):
            value = score.logprobs[i] if i < len(score.tokens) and score.tokens[i] == token else None
            reference = first.logprobs[i]
            if value is not None and reference is not None:
                self.captured.pairs.append(_pair_of(prompt, route, i, token, value, reference))


def _pair_of(
    prompt: ServedPrompt, route: str, index: int, token: Token, value: float, reference: float, gap: float | None = None
) -> LogprobPair:
    return LogprobPair(
        prompt=prompt.name,
        route=route,
        index=index,
        position=prompt.n_tokens + index,
        token=token,
        value=value,
        reference=reference,
        gap=gap,
    )
