"""Runs a server through its routes and pairs what comes back. It knows requests and tokens, and nothing of noise.

The order of requests is part of the measurement: a request alone comes before its neighbours, a cold cache before a
warm one, and a score never directly after the generation that it scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

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
    Captured,
    Generation,
    Pair,
    Prompt,
    Score,
    Token,
)
from kvdrift.vocabulary.progress import Progress

# Tokens put behind the scored ones to change the length, and with it the shape of every matrix product.
_APPENDED = 19


@dataclass(slots=True)
class _Run:
    """What is known so far: solo generations and the scores of token sequences."""

    prompts: list[Prompt]
    solo: dict[str, Generation] = field(default_factory=dict)
    scores: dict[tuple[str, tuple[Token, ...]], Score] = field(default_factory=dict)
    decodes: dict[str, dict[str, Generation]] = field(default_factory=dict)


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

    def say(prompt: Prompt, what: str) -> None:
        progress.step(f"{prompt.name}: {what}")

    prepared = []
    for name in names:
        progress.step(f"{name}: its tokens")
        prepared.append(dialect.prepare(name, prompts[name]))
    captured.prompts = prepared
    run = _Run(prepared)
    try:
        _solo(dialect, plan, run, captured, say)
        for route, action in (
            (DECODE_REPEAT, lambda: _again(dialect, plan, run, captured, say, DECODE_REPEAT)),
            (SPOILED, lambda: _spoiled(dialect, run, captured, say)),
            (DECODE_WARM, lambda: _again(dialect, plan, run, captured, say, DECODE_WARM)),
            (DECODE_BATCHED, lambda: _batched(dialect, plan, run, captured, say)),
            (PREFILL_LONGER, lambda: _prefills(dialect, run, captured, say, PREFILL_LONGER)),
            (PREFILL_REPEAT, lambda: _prefills(dialect, run, captured, say, PREFILL_REPEAT)),
            (PREFILL_BATCHED, lambda: _prefills_batched(dialect, plan, run, captured)),
        ):
            if route in (PREFILL_LONGER, PREFILL_REPEAT, PREFILL_BATCHED) and route not in extras:
                continue
            if route == DECODE_BATCHED and not dialect.batches:
                continue
            _attempt(route, action, captured)
    except BudgetSpent as error:
        captured.failures["requests"] = str(error)
    _decode_noise(run, captured)
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


def _attempt(route: str, action: Callable[[], None], captured: Captured) -> None:
    """Run one route. The server's failure there is a missing route, not the end of the audit."""
    try:
        action()
    except BudgetSpent:
        raise
    except CaptureError as error:
        captured.failures[route] = str(error)


def _solo(
    dialect: Dialect, plan: ServerPlan, run: _Run, captured: Captured, say: Callable[[Prompt, str], None]
) -> None:
    for number, prompt in enumerate(run.prompts):
        say(prompt, "decode, alone")
        captured.n_asked += plan.span
        generation = dialect.generate(prompt, plan.span, seed=plan.seed + number, cache="cold")
        _check(generation, plan.span, captured)
        run.solo[prompt.name] = generation
        run.decodes.setdefault(DECODE_SOLO, {})[prompt.name] = generation
    # All generations come first: a score directly after its own generation may be answered from what decode has left.
    for prompt in run.prompts:
        say(prompt, "prefill, alone")
        generation = run.solo[prompt.name]
        if generation.tokens:
            run.scores[prompt.name, generation.tokens] = dialect.score(prompt, generation.tokens)
    for prompt in run.prompts:
        _pair(dialect, prompt, DECODE_SOLO, run.solo[prompt.name], run, captured)


def _check(generation: Generation, span: int, captured: Captured) -> None:
    if len(generation.tokens) > span:
        raise CaptureError(f"the server generated {len(generation.tokens)} tokens, and {span} were asked for")
    missing = span - len(generation.tokens)
    captured.lost(
        "the model ended the text" if generation.ended else "the server sent fewer tokens than asked", missing
    )


def _again(
    dialect: Dialect,
    plan: ServerPlan,
    run: _Run,
    captured: Captured,
    say: Callable[[Prompt, str], None],
    route: str,
) -> None:
    for number, prompt in enumerate(run.prompts):
        say(prompt, f"decode, {'prefix cache warm' if route == DECODE_WARM else 'once more'}")
        if route == DECODE_WARM:
            dialect.generate(prompt, 1, seed=plan.seed + number, cache="warm")
        generation = dialect.generate(
            prompt, plan.span, seed=plan.seed + number, cache="warm" if route == DECODE_WARM else "cold"
        )
        captured.n_asked += plan.span
        _check(generation, plan.span, captured)
        run.decodes.setdefault(route, {})[prompt.name] = generation
        if generation.n_cached is not None and route == DECODE_WARM:
            captured.n_cached[route] = captured.n_cached.get(route, 0) + generation.n_cached
        _pair(dialect, prompt, route, generation, run, captured)


def _batched(
    dialect: Dialect, plan: ServerPlan, run: _Run, captured: Captured, say: Callable[[Prompt, str], None]
) -> None:
    def generate(item: tuple[int, Prompt]) -> Generation:
        number, prompt = item
        return dialect.generate(prompt, plan.span, seed=plan.seed + number, cache="cold")

    with ThreadPoolExecutor(plan.neighbours) as pool:
        generations = list(pool.map(generate, enumerate(run.prompts)))
    for prompt, generation in zip(run.prompts, generations, strict=True):
        say(prompt, "decode, neighbours in flight")
        captured.n_asked += plan.span
        _check(generation, plan.span, captured)
        run.decodes.setdefault(DECODE_BATCHED, {})[prompt.name] = generation
        _pair(dialect, prompt, DECODE_BATCHED, generation, run, captured)


def _spoiled(dialect: Dialect, run: _Run, captured: Captured, say: Callable[[Prompt, str], None]) -> None:
    """Score the generated tokens after a prompt with one token replaced: what one foreign row would do."""
    for prompt in run.prompts:
        say(prompt, "the positive control")
        spoiled = dialect.spoil(prompt)
        tokens = run.solo[prompt.name].tokens
        if spoiled is None or not tokens:
            continue
        _pair_score(prompt, SPOILED, dialect.score(spoiled, tokens), run, captured)


def _prefills(dialect: Dialect, run: _Run, captured: Captured, say: Callable[[Prompt, str], None], route: str) -> None:
    for number, prompt in enumerate(run.prompts):
        say(prompt, "prefill, more appended" if route == PREFILL_LONGER else "prefill, once more")
        tokens = run.solo[prompt.name].tokens
        if not tokens:
            continue
        appended: tuple[int, ...] = ()
        if route == PREFILL_LONGER:
            other = run.prompts[(number + 1) % len(run.prompts)].ids or (0,)
            appended = tuple((other * _APPENDED)[:_APPENDED])
        _pair_score(prompt, route, dialect.score(prompt, tokens, appended=appended), run, captured)


def _prefills_batched(dialect: Dialect, plan: ServerPlan, run: _Run, captured: Captured) -> None:
    chosen = [prompt for prompt in run.prompts if run.solo[prompt.name].tokens]
    with ThreadPoolExecutor(plan.neighbours) as pool:
        scores = list(pool.map(lambda prompt: dialect.score(prompt, run.solo[prompt.name].tokens), chosen))
    for prompt, score in zip(chosen, scores, strict=True):
        _pair_score(prompt, PREFILL_BATCHED, score, run, captured)


def _pair(dialect: Dialect, prompt: Prompt, route: str, generation: Generation, run: _Run, captured: Captured) -> None:
    """Pair a generation with the score of its own tokens, which is measured now if no other route had the same ones."""
    tokens = generation.tokens
    if not tokens:
        return
    key = (prompt.name, tokens)
    if key not in run.scores:
        run.scores[key] = dialect.score(prompt, tokens)
    score = run.scores[key]
    if score.n_computed is not None:
        whole = score.n_computed >= prompt.n_tokens + len(tokens)
        captured.n_computed_all = whole and captured.n_computed_all is not False
    for i, token in enumerate(tokens):
        if i >= len(score.tokens) or score.tokens[i] != token:
            captured.lost("prompt and generation were cut into different tokens", len(tokens) - i)
            break
        reference = score.logprobs[i]
        if reference is None:
            continue  # not scored on purpose: the dialect takes a sample of positions
        captured.pairs.append(
            Pair(
                prompt=prompt.name,
                route=route,
                index=i,
                position=prompt.n_tokens + i,
                token=token,
                value=generation.logprobs[i],
                reference=reference,
                gap=generation.gaps[i],
            )
        )


def _pair_score(prompt: Prompt, route: str, score: Score, run: _Run, captured: Captured) -> None:
    """Pair another score of the solo generation's tokens with the first one."""
    tokens = run.solo[prompt.name].tokens
    first = run.scores[prompt.name, tokens]
    for i, token in enumerate(tokens):
        value = score.logprobs[i] if i < len(score.tokens) and score.tokens[i] == token else None
        reference = first.logprobs[i]
        if value is not None and reference is not None:
            captured.pairs.append(
                Pair(
                    prompt=prompt.name,
                    route=route,
                    index=i,
                    position=prompt.n_tokens + i,
                    token=token,
                    value=value,
                    reference=reference,
                )
            )


def _decode_noise(run: _Run, captured: Captured) -> None:
    """Compare decode routes with each other, token by token as long as they sampled the same ones."""
    routes = list(run.decodes)
    for i, first in enumerate(routes):
        for second in routes[i + 1 :]:
            pairs = []
            for prompt in run.prompts:
                one, other = run.decodes[first].get(prompt.name), run.decodes[second].get(prompt.name)
                if one is None or other is None:
                    continue
                for k, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=False)):
                    if a != b:
                        break
                    pairs.append(
                        Pair(
                            prompt=prompt.name,
                            route=second,
                            index=k,
                            position=prompt.n_tokens + k,
                            token=a,
                            value=other.logprobs[k],
                            reference=one.logprobs[k],
                            gap=one.gaps[k],
                        )
                    )
            captured.decode_noise[first, second] = pairs
