"""Runs a server through its routes and pairs what comes back. It knows requests and tokens, and nothing of noise.

The order of requests is part of the measurement: a request alone comes before its neighbours, a cold cache before a
warm one, and a score never directly after the generation that it scores.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from kvdrift.errors import CaptureError, UsageError
from kvdrift.server.client import BudgetSpent, Client
from kvdrift.server.dialects.base import Dialect
from kvdrift.server.plan import ServerPlan
from kvdrift.server.sequential import generation_of, power_of
from kvdrift.server.values import (
    AGAINST,
    CUT,
    DECODE_BATCHED,
    DECODE_FEW,
    DECODE_REPEAT,
    DECODE_SOLO,
    DECODE_WARM,
    ENDED,
    FORCED,
    FORCED_REPEAT,
    GENERATION,
    PREFILL_BATCHED,
    PREFILL_LONGER,
    PREFILL_PARTS,
    PREFILL_REPEAT,
    SPOILED,
    Cache,
    Captured,
    LogprobPair,
    Score,
    ServedPrompt,
    ServedTokens,
    Token,
    Tops,
    Walked,
)
from kvdrift.server.waves import most_rows, waves_of
from kvdrift.vocabulary.progress import Progress

# Tokens put behind the scored ones to change the length, and with it the shape of every matrix product.
_APPENDED = 19


def capture_server(
    dialect: Dialect,
    client: Client,
    plan: ServerPlan,
    prompts: Mapping[str, str | Sequence[int]],
    progress: Progress,
    other: Dialect | None = None,
) -> Captured:
    """Send everything, and return the pairs; `other` is a second server, which scores what the first one has decoded.

    Raises:
        UsageError: the bound on requests is too low for two prompts.
        CaptureError: the server failed on a request that nothing can be said without.
    """
    captured = Captured()
    names, extras, spare = _affordable(dialect, client, plan, list(prompts), captured)
    captured.power = power_of(dialect.facts, plan, len(names), forces=dialect.forces)
    progress.say(captured.power)
    # A step for each request in sight; own scores of diverging routes come on top.
    progress.start(len(names) * (8 + len(extras)))
    for name in names:
        progress.step(f"{name}: its tokens")
        captured.prompts.append(dialect.prepare(name, prompts[name]))
    run = _Run(dialect, plan, captured, progress, spare)
    try:
        run.solo_routes()
        if other is not None:
            captured.same_build = _same_build(dialect, other)
            run.score_elsewhere(other, prompts)
        run.attempt(DECODE_REPEAT, run.decode_alone, DECODE_REPEAT, "cold")
        run.attempt(SPOILED, run.score_spoiled)
        run.attempt(DECODE_WARM, run.decode_alone, DECODE_WARM, "warm")
        if dialect.batches:
            if dialect.forces:
                run.attempt(DECODE_FEW, run.decode_in_waves)
            run.attempt(DECODE_BATCHED, run.decode_together)
        for route in (PREFILL_LONGER, PREFILL_REPEAT, PREFILL_BATCHED):
            if route in extras:
                run.attempt(route, run.score_again, route)
        run.deepen(client)
    except BudgetSpent as error:
        captured.failures["requests"] = str(error)
    run.compare_decodes()
    captured.n_requests = client.n_requests
    return captured


def _same_build(one: Dialect, other: Dialect) -> bool:
    """Whether two servers tell the same kind, version and weights; what neither tells is not the same."""
    a, b = one.facts, other.facts
    return a.version is not None and (a.dialect, a.version, a.weights) == (b.dialect, b.version, b.weights)


def _affordable(
    dialect: Dialect, client: Client, plan: ServerPlan, names: list[str], captured: Captured
) -> tuple[list[str], tuple[str, ...], int]:
    """Return the prompts and the extra prefill routes that the bound on requests has room for, and what is left."""
    score = dialect.score_requests(plan.span)
    if dialect.forces:
        # Tokens, generations alone, again and on a warm cache with its filling, the walk, and the positive control.
        needed = 5 + 2 * dialect.batches + dialect.walk_requests(plan.span, whole=True) + score
        possible = []
    else:
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
    spare = client.n_left - n_prompts * (needed + len(extras) * score)
    return names[:n_prompts], tuple(extras), spare


@dataclass(slots=True)
class _Run:
    """The requests of one audit, and what is known so far.

    Attributes:
        spare: requests that may be sent beside those that every prompt takes.
        solo: the generation of each prompt alone on a cold cache.
        scores: by prompt and tokens; the first score of a sequence is the reference of every route that sampled it.
        decodes: generations by route and prompt.
        seen: prompts with the beginnings of texts that decode was compared with forced tokens on.
    """

    dialect: Dialect
    plan: ServerPlan
    captured: Captured
    progress: Progress
    spare: int
    solo: dict[str, ServedTokens] = field(default_factory=dict)
    scores: dict[tuple[str, tuple[Token, ...]], Score] = field(default_factory=dict)
    decodes: dict[str, dict[str, ServedTokens]] = field(default_factory=lambda: defaultdict(dict))
    seen: set[tuple[str, tuple[Token, ...]]] = field(default_factory=set)

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
            if generation.tokens and self.dialect.forces:
                walk = self.dialect.walk(prompt, generation.tokens, whole=True)
                self.scores[prompt.name, generation.tokens] = walk.fresh
                self._pair_walk(prompt, generation, walk)
            elif generation.tokens:
                self.scores[prompt.name, generation.tokens] = self.dialect.score(prompt, generation.tokens)
        for prompt in self.captured.prompts:
            self._pair(prompt, DECODE_SOLO, self.solo[prompt.name])

    def score_elsewhere(self, other: Dialect, given: Mapping[str, str | Sequence[int]]) -> None:
        """Have the second server score the texts of the first.

        Raises:
            UsageError: it cuts a prompt into other tokens.
        """
        for prompt in self._with_tokens():
            self._say(prompt, "prefill of the other server")
            theirs = other.prepare(prompt.name, given[prompt.name])
            if (theirs.ids, theirs.n_tokens) != (prompt.ids, prompt.n_tokens):
                raise UsageError(
                    f"the server at {other.facts.url} cuts the prompt {prompt.name!r} into other tokens; --against "
                    "takes a server of the same model (against=...)"
                )
            tokens = self.solo[prompt.name].tokens
            ours, score = self.scores[prompt.name, tokens], other.score(theirs, tokens)
            for i, token in enumerate(tokens):
                one, two = _at(ours, i), _at(score, i)
                if one is not None and two is not None:
                    self.captured.pairs.append(_pair_of(prompt, AGAINST, i, token, one, two))

    def deepen(self, client: Client) -> None:
        """Decode further texts against the same tokens forced, until that is decided or the requests are spent."""
        if not self.dialect.forces or FORCED in self.captured.absent:
            return
        span = min(self.plan.span, 3)
        cost = 1 + self.dialect.walk_requests(span, whole=False)
        # Where the server repeats itself best, a difference says most.
        order = sorted(self.captured.prompts, key=lambda prompt: self._self_noise(prompt.name))
        for n in itertools.count(len(order)):
            if generation_of(self.captured, self.plan).decided or client.n_left < cost:
                return
            prompt = order[n % len(order)]
            self._say(prompt, "decode against the same tokens forced, another text")
            generation = self.dialect.generate(prompt, span, seed=self.plan.seed + n, cache="cold")
            if (prompt.name, generation.tokens) in self.seen:
                continue  # equal texts are one unit; another seed may bring another text
            self.seen.add((prompt.name, generation.tokens))
            walk = self.dialect.walk(prompt, generation.tokens, whole=False)
            self._pair_generation(prompt, generation, walk, unit=f"{prompt.name} #{n // len(order) + 1}")

    def decode_alone(self, route: str, cache: Cache) -> None:
        """Decode every prompt alone once more; on a warm cache, after a request that fills it."""
        # Several slots offer rows of other texts that begin alike, which other kernels computed. The rows that are
        # handed out are to be those of this prompt alone, or rounding hides what the prefix cache does.
        filling: Cache = "cold" if self.dialect.forces and self.dialect.batches else cache
        for number, prompt in enumerate(self.captured.prompts):
            self._say(prompt, f"decode, {'prefix cache warm' if cache == 'warm' else 'once more'}")
            if cache == "warm":
                self.dialect.generate(prompt, 1, seed=self.plan.seed + number, cache=filling)
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

    def decode_in_waves(self) -> None:
        """Decode with neighbours that are few enough to change nothing, where that many rows are known."""
        by_name = {prompt.name: (number, prompt) for number, prompt in enumerate(self.captured.prompts)}
        quiet = most_rows(self.captured.pairs)
        most = min(self.plan.neighbours, self.dialect.facts.n_slots or self.plan.neighbours)
        waves = waves_of({name: prompt.n_tokens for name, (_, prompt) in by_name.items()}, quiet, most)
        n_prompts = len({name for wave in waves for name in wave})
        if 2.0 ** (1 - n_prompts) > self.plan.alpha:
            self.captured.absent[DECODE_FEW] = (
                f"prefill repeats itself in every digit with fewer than {quiet} rows; {n_prompts} prompts have no more "
                f"together with a neighbour, too few for alpha {self.plan.alpha:g}"
            )
            return
        done: set[str] = set()
        for wave in waves:
            if len(done.union(wave)) < len(done) + len(wave):  # the shortest prompt once more
                if not self.spare:
                    continue
                self.spare -= 1
            with ThreadPoolExecutor(len(wave)) as pool:
                generations = list(pool.map(lambda name: self._generate(*by_name[name], "cold"), wave))
            for name, generation in zip(wave, generations, strict=True):
                if name not in done:
                    prompt = by_name[name][1]
                    self._say(prompt, "decode, few neighbours in flight")
                    self._keep(prompt, DECODE_FEW, generation)
                    self._pair(prompt, DECODE_FEW, generation)
            done |= {*wave}

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
        for first, second in itertools.combinations(self.decodes, 2):
            pairs = []
            for prompt in self.captured.prompts:
                one, other = self.decodes[first].get(prompt.name), self.decodes[second].get(prompt.name)
                if one is None or other is None:
                    continue
                for i, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
                    if a != b:
                        break
                    pairs.append(_pair_of(prompt, second, i, a, _said(other, i), _said(one, i), one.gaps[i]))
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
        why = ENDED if generation.ended else CUT if generation.cut else "the server sent fewer tokens than asked"
        self.captured.lost(why, span - len(generation.tokens))
        self.decodes[route][prompt.name] = generation

    def _pair(self, prompt: ServedPrompt, route: str, generation: ServedTokens) -> None:
        """Pair a generation with the score of its own tokens, which is measured now if no other route had the same."""
        tokens = generation.tokens
        if not tokens:
            return
        score = self._score_of(prompt, tokens)
        if score.n_computed is not None:
            whole = score.n_computed >= prompt.n_tokens + len(tokens)
            self.captured.n_computed_all = whole and self.captured.n_computed_all is not False
        for i, token in enumerate(tokens):
            if i >= len(score.tokens) or score.tokens[i] != token:
                if not self.dialect.forces:
                    self.captured.lost("prompt and generation were cut into different tokens", len(tokens) - i)
                break
            reference = _at(score, i)
            if reference is not None:  # otherwise not scored on purpose: the dialect takes a sample of positions
                gap = generation.gaps[i]
                self.captured.pairs.append(_pair_of(prompt, route, i, token, _said(generation, i), reference, gap))

    def _score_of(self, prompt: ServedPrompt, tokens: tuple[Token, ...]) -> Score:
        """Return the score of a text, measured now if it is new.

        Where each scored token is a request, the score of the text that decode alone has brought serves up to the token
        at which the two part, unless they part at once.
        """
        key = (prompt.name, tokens)
        if key not in self.scores and self.dialect.forces:
            solo = self.scores.get((prompt.name, self.solo[prompt.name].tokens))
            if solo is not None:
                common = sum(itertools.accumulate((a == b for a, b in zip(tokens, solo.tokens, strict=False)), min))
                cost = self.dialect.score_requests(len(tokens))
                if self.spare < cost or sum(solo.logprobs[i] is not None for i in range(1, common)) >= 2:
                    return solo
                self.spare -= cost
        if key not in self.scores:
            self.scores[key] = self.dialect.score(prompt, tokens)
        return self.scores[key]

    def _pair_walk(self, prompt: ServedPrompt, generation: ServedTokens, walk: Walked) -> None:
        """Pair what was forced, what was computed in parts and what was repeated with its reference."""
        if walk.why_not is not None:
            self.captured.absent[FORCED] = walk.why_not
            return
        self.seen.add((prompt.name, generation.tokens[:3]))
        for route, score, reference in (
            (FORCED, walk.forced, walk.fresh),
            (PREFILL_PARTS, walk.parts, walk.fresh),
            (FORCED_REPEAT, walk.repeat, walk.forced),
        ):
            for i, token in enumerate(generation.tokens):
                one, other = _at(score, i), _at(reference, i)
                # The first token is not a step: its forced score is the reference itself.
                if one is not None and other is not None and i > 0:
                    self.captured.pairs.append(_pair_of(prompt, route, i, token, one, other))
        self._pair_generation(prompt, generation, walk, unit=prompt.name)

    def _pair_generation(self, prompt: ServedPrompt, generation: ServedTokens, walk: Walked, *, unit: str) -> None:
        """Pair the first tokens of a generation with the same tokens forced, the one that ends the prompt included."""
        for i, token in enumerate(generation.tokens):
            forced = _at(walk.forced, i)
            if forced is not None:
                pair = _pair_of(prompt, GENERATION, i, token, _said(generation, i), forced)
                self.captured.pairs.append(replace(pair, prompt=unit))

    def _self_noise(self, name: str) -> float:
        """Return how far the server was from itself on a prompt, in nats."""
        sizes = [p.size for p in self.captured.pairs if p.prompt == name and p.route in (FORCED, PREFILL_PARTS)]
        return max((size for size in sizes if math.isfinite(size)), default=math.inf)

    def _pair_score(self, prompt: ServedPrompt, route: str, score: Score) -> None:
        """Pair another score of the solo generation's tokens with the first one."""
        tokens = self.solo[prompt.name].tokens
        first = self.scores[prompt.name, tokens]
        for i, token in enumerate(tokens):
            value = _at(score, i) if i < len(score.tokens) and score.tokens[i] == token else None
            reference = _at(first, i)
            if value is not None and reference is not None:
                self.captured.pairs.append(_pair_of(prompt, route, i, token, value, reference))


@dataclass(frozen=True, slots=True)
class _Said:
    """What an answer says of one token: its logprob, and those of the likeliest ones."""

    logprob: float
    tops: Tops


def _said(generation: ServedTokens, index: int) -> _Said:
    return _Said(generation.logprobs[index], generation.tops[index] if index < len(generation.tops) else {})


def _at(score: Score | None, index: int) -> _Said | None:
    """Return what a score says of a token, None if it does not score it."""
    value = None if score is None or index >= len(score.logprobs) else score.logprobs[index]
    if score is None or value is None:
        return None
    return _Said(value, score.tops[index] if index < len(score.tops) else {})


def _pair_of(
    prompt: ServedPrompt, route: str, index: int, token: Token, value: _Said, reference: _Said, gap: float | None = None
) -> LogprobPair:
    common = value.tops.keys() & reference.tops.keys()
    squares = [(value.tops[t] - reference.tops[t]) ** 2 for t in common]
    return LogprobPair(
        prompt=prompt.name,
        route=route,
        index=index,
        position=prompt.n_tokens + index,
        token=token,
        value=value.logprob,
        reference=reference.logprob,
        gap=gap,
        spread=math.sqrt(sum(squares) / len(squares)) if len(squares) > 1 else None,
    )
