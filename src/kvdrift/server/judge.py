"""From pairs of logprobs to a verdict: what noise can be on this server, what goes beyond it, and what would be seen.

docs/engines/server.md has the reasoning; the numbers here have their sources there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace

import numpy as np

from kvdrift.instruments.sign_flips import sign_flip_max_t
from kvdrift.server.estimates import ChangePoint, Floats, change_point, divergence, lag, rms
from kvdrift.server.explain import diagnose, doubts_of
from kvdrift.server.outcome import CONTRAST, FIRST_TOKEN, STEP_P, RouteResult, ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.rounding import DIGITS, MARGIN, rounding_of
from kvdrift.server.sequential import FAMILY_SHARE, generation_of
from kvdrift.server.values import (
    AGAINST,
    ALONE,
    DECODE_BATCHED,
    DECODE_FEW,
    DECODE_SOLO,
    DECODES,
    FORCED,
    FORCED_REPEAT,
    GENERATION,
    PREFILL_BATCHED,
    PREFILL_REPEAT,
    PREFILLS,
    SPOILED,
    Captured,
    LogprobPair,
    ServerFacts,
)
from kvdrift.server.waves import most_rows, quiet_below
from kvdrift.vocabulary.evidence import Verdict

# Where a server was seen to differ from itself at so many places, the size of that is its noise, and no assumption.
_ENOUGH_NOISE = 8
# A single prompt, or a single token, beyond these multiples of the bound needs no company.
PROMPT_EXTREME, TOKEN_EXTREME = 4.0, 16.0
# The log of drift over bound is limited to this, so that one prompt of zero drift does not swamp the others.
_LOG_LIMIT = math.log(64.0)
# Prompts that the sign-flip test needs before it can reach alpha = 0.001 are 11; fewer never suffice for anything.
_FEWEST_PROMPTS = 2
_FEWEST_UNITS = 2


def judge(captured: Captured, facts: ServerFacts, plan: ServerPlan) -> ServerDecision:
    """Judge what was captured."""
    by_route = _by_route(captured)
    rounding, source = rounding_of(facts)
    noises = {route: rms(_drift(by_route[route])) for route in (FIRST_TOKEN, *PREFILLS) if by_route.get(route)}
    results = _by_family(by_route, rounding, captured, plan)
    if by_route.get(DECODE_FEW):
        results.append(
            _few(by_route, captured, plan, max((r.noise for r in results if r.route in ALONE), default=rounding))
        )
    if by_route.get(GENERATION):
        results.append(_generation(by_route[GENERATION], captured, plan))
    decision = ServerDecision(
        Verdict.INCONCLUSIVE,
        results,
        None,
        rounding,
        source,
        self_noise=noises | {f"{a} / {b}": rms(_drift(p)) for (a, b), p in captured.decode_noise.items() if p},
        smallest_p=2.0 ** (1 - len(captured.prompts)),
    )
    # What an unknown dtype may hide is not made known by drift that happens to be small.
    measured = facts.dtype is not None or GENERATION in by_route
    decision.minimum_detectable, decision.seen_below = _minimum(decision, by_route, captured, plan, measured)
    if by_route.get(SPOILED):
        # The control must be seen by what a pass would rest on.
        noise = max((r.noise for r in results if r.route != GENERATION), default=rounding)
        bound = min(MARGIN * noise, decision.minimum_detectable or math.inf)
        decision.control = _test([SPOILED], by_route, noise, {SPOILED: bound}, captured, plan)[0]
    decision.shift = _shift(by_route)
    if decision.shift or any(r.beyond for r in results):
        decision.verdict = Verdict.MISMATCH
        decision.diagnosis = diagnose(decision)
        return decision
    decision.reasons = doubts_of(decision, captured, facts, plan)
    if not decision.reasons:
        decision.verdict = Verdict.STRUCTURAL_DRIFT
    return decision


def _by_family(
    by_route: dict[str, list[LogprobPair]], rounding: float, captured: Captured, plan: ServerPlan
) -> list[RouteResult]:
    """Judge prefill against itself, then single steps and decode against prefill.

    Prefill comes first, against rounding alone: what goes beyond that must not be the noise of decode.
    """
    results: list[RouteResult] = []
    for family in ((FIRST_TOKEN, *PREFILLS), (FORCED, *DECODES, AGAINST)):
        present = [route for route in family if by_route.get(route)]
        noise = rounding
        if family[0] == FORCED:
            right = [r for r in results if not r.beyond and r.typical <= r.bound]
            # A server that rounds to few bits differs from itself here and there, and then by as much as decode does.
            # The first token is left out: one of its sides is decode's.
            own = [p for r in right if r.route != FIRST_TOKEN for p in by_route[r.route]]
            seen = np.array([p.size for p in own if DIGITS < p.size < math.inf])
            if FORCED in present and seen.size >= _ENOUGH_NOISE:
                noise = rms(seen)
            else:
                noise = max([rounding, *(r.typical for r in right if r.route != FIRST_TOKEN or FORCED not in present)])
        bounds = dict.fromkeys(present, MARGIN * noise)
        if DECODE_SOLO in present:
            like_solo = CONTRAST * max(rms(_drift(by_route[DECODE_SOLO])), rounding / MARGIN)
            bounds |= {route: min(bounds[route], like_solo) for route in present if route in DECODES[1:]}
        if DECODE_BATCHED in present and FORCED in present:
            # Neighbours change the shapes of all products at once; prefill with neighbours says by how much.
            beside = next((r.typical for r in results if r.route == PREFILL_BATCHED and not r.beyond), 0.0)
            bounds[DECODE_BATCHED] = max(bounds[DECODE_BATCHED], MARGIN * beside)
        if AGAINST in present:
            bounds[AGAINST] = MARGIN * _noise_of_twins(by_route, noise, captured)
        results += _test(present, by_route, noise, bounds, captured, plan)
    order = [FIRST_TOKEN, *PREFILLS, FORCED, *DECODES, AGAINST]
    return sorted(results, key=lambda r: order.index(r.route))


def _few(by_route: dict[str, list[LogprobPair]], captured: Captured, plan: ServerPlan, noise: float) -> RouteResult:
    """Say how small an error of decode beside a few neighbours would have been seen: `bound`, if it is `within`.

    These are fewer rows than those with which prefill repeats itself in every digit. It has no share of alpha: a kernel
    for two or three rows may round otherwise than that for one, so that a difference is no fault until it is beyond
    noise. It then keeps the server from passing.
    """
    pairs, below, loud = by_route[DECODE_FEW], most_rows(captured.pairs), MARGIN * noise
    found = _smallest([DECODE_FEW], {DECODE_FEW: [p for p in pairs if p.position < below]}, plan, captured)
    logs, _ = _flips(
        [DECODE_FEW], {DECODE_FEW: _prompts(pairs)}, {DECODE_FEW: loud}, [p.name for p in captured.prompts], plan.seed
    )
    mean = float(logs.mean()) if logs.size else math.nan
    result = _result(DECODE_FEW, pairs, _prompts(pairs), noise, loud, mean, None, plan)
    return result if found is None or result.beyond else replace(result, within=True, bound=found)


def _noise_of_twins(by_route: dict[str, list[LogprobPair]], noise: float, captured: Captured) -> float:
    """Return the noise between two servers, in nats.

    Two of one build run the same kernels on the same shapes; between them is what one answer differs by from the same
    request again. Other builds may round otherwise.
    """
    again = [p for route in (FORCED_REPEAT, PREFILL_REPEAT) for p in by_route.get(route, [])]
    if not captured.same_build or not again:
        return noise
    return max(rms(np.array([p.size for p in again])), DIGITS)


def _generation(pairs: list[LogprobPair], captured: Captured, plan: ServerPlan) -> RouteResult:
    """Judge decode against the same tokens forced, by the test that may have ended the requests."""
    test = generation_of(captured, plan)
    why = ""
    if test.beyond:
        why = (
            f"{len(test.differing)} of {len(test.sizes)} texts differ from the same tokens forced one by one, by more "
            f"than {test.bound:.2g} nats (evidence {test.against:.3g}, wanted {test.wanted:g})"
        )
    result = _result(
        GENERATION,
        pairs,
        _prompts(pairs),
        test.bound / MARGIN,
        test.bound,
        math.nan,
        min(1.0, 1.0 / test.against),
        plan,
    )
    sizes = [max(size, 1e-3 * test.bound) for size in test.sizes.values() if size < math.inf]
    return replace(
        result,
        ratio=math.exp(sum(math.log(size / test.bound) for size in sizes) / len(sizes)) if sizes else math.nan,
        beyond=test.beyond or bool(result.n_nonfinite),
        within=test.within,
        why=why or (result.why if result.n_nonfinite else ""),
        worst=(_first_beyond(pairs, test.bound) or result.worst) if why else result.worst,
        divergence=None,
        change=None,
    )


def _minimum(
    decision: ServerDecision,
    by_route: dict[str, list[LogprobPair]],
    captured: Captured,
    plan: ServerPlan,
    measured: bool,
) -> tuple[float | None, int | None]:
    """Return the typical error of decode that would have been seen, in nats, and below which position (None: at all).

    What lies beyond a bound is seen. Less is seen where drift itself is less: an error of a given size cannot hide in
    drift that is clearly smaller. Where prefill repeats itself in every digit up to some position, that is asked of the
    positions in front of it.
    """
    alone = [r for r in decision.routes if r.route in ALONE]
    if not alone:
        return max((r.bound for r in decision.routes if r.route in DECODES), default=None), None
    largest = max(r.bound for r in alone)
    if largest <= plan.resolution or not measured:
        return largest, None
    routes = [r.route for r in alone]
    for end in (None, quiet_below(captured.pairs)):
        near = {route: [p for p in by_route[route] if end is None or p.position < end] for route in routes}
        if (size := _smallest(routes, near, plan, captured)) is not None:
            return size, end
    return largest, None


def _smallest(
    routes: list[str], pairs: dict[str, list[LogprobPair]], plan: ServerPlan, captured: Captured
) -> float | None:
    """Return the size, in nats, that drift on all these routes is clearly smaller than: the smallest that digits show,
    or what a pass must rule out; None if it is not."""
    grouped = {route: _prompts(pairs[route]) for route in routes}
    names = [prompt.name for prompt in captured.prompts]
    for size in (MARGIN * DIGITS, plan.resolution):
        logs, p_values = _flips(routes, grouped, dict.fromkeys(routes, size), names, plan.seed)
        if all(p is not None and p <= plan.alpha for p in p_values) and (logs.mean(axis=1) < 0.0).all():
            return size
    return None


def _by_route(captured: Captured) -> dict[str, list[LogprobPair]]:
    """Return pairs by route; generated tokens with index 0 are not decode steps."""
    found: dict[str, list[LogprobPair]] = defaultdict(list)
    for pair in captured.pairs:
        if pair.route in (*DECODES, DECODE_FEW) and pair.index == 0:
            if pair.route == DECODE_SOLO:
                found[FIRST_TOKEN].append(pair)
            continue
        found[pair.route].append(pair)
    return found


def _drift(pairs: list[LogprobPair]) -> Floats:
    """Return the drift of pairs; those that are not finite are judged by themselves, and are left out here."""
    values = np.array([pair.drift for pair in pairs], dtype=np.float64)
    return np.asarray(values[np.isfinite(values)])


def _prompts(pairs: list[LogprobPair]) -> dict[str, list[LogprobPair]]:
    found: dict[str, list[LogprobPair]] = defaultdict(list)
    for pair in pairs:
        found[pair.prompt].append(pair)
    return found


def _flips(
    routes: list[str],
    grouped: dict[str, dict[str, list[LogprobPair]]],
    bounds: dict[str, float],
    names: list[str],
    seed: int,
) -> tuple[Floats, list[float | None]]:
    """Return the log of drift over bound [route, prompt], and the p-value of each route.

    The unit of the permutation is the prompt; one that a route lacks is left out of the test for all of them. A route
    whose drift is above its bound has the p-value of one max-T test over all routes, since any one of them is an alarm.
    One below has that of its own test: a pass needs every route to be below, so that the chance of passing with one
    that is not stays that of a single test (intersection-union; Berger, Technometrics 24, 1982).
    """
    needed = {route: 1 if route == FIRST_TOKEN else _FEWEST_UNITS for route in routes}
    complete = [
        name for name in names if all(len(_drift(grouped[route].get(name, []))) >= needed[route] for route in routes)
    ]
    logs = np.array(
        [[_log_ratio(grouped[route][name], bounds[route]) for name in complete] for route in routes], dtype=np.float64
    ).reshape(len(routes), len(complete))
    if len(complete) < _FEWEST_PROMPTS or not routes:
        return logs, [None] * len(routes)
    of_all = sign_flip_max_t(logs, seed=seed).p_values
    return logs, [
        float(of_all[row]) if mean > 0.0 else float(sign_flip_max_t(logs[[row]], seed=seed).p_values[0])
        for row, mean in enumerate(logs.mean(axis=1))
    ]


def _test(
    routes: list[str],
    by_route: dict[str, list[LogprobPair]],
    noise: float,
    bounds: dict[str, float],
    captured: Captured,
    plan: ServerPlan,
) -> list[RouteResult]:
    """Test some routes together: one max-T test over all of them, and the rules for what needs no test."""
    grouped = {route: _prompts(by_route[route]) for route in routes}
    logs, p_values = _flips(routes, grouped, bounds, [prompt.name for prompt in captured.prompts], plan.seed)
    results = []
    for row, route in enumerate(routes):
        mean = float(logs[row].mean()) if logs.shape[1] else math.nan
        results.append(_result(route, by_route[route], grouped[route], noise, bounds[route], mean, p_values[row], plan))
    return results


def _log_ratio(pairs: list[LogprobPair], bound: float) -> float:
    size = rms(_drift(pairs))
    return float(np.clip(math.log(size / bound), -_LOG_LIMIT, _LOG_LIMIT)) if size > 0.0 else -_LOG_LIMIT


def _result(
    route: str,
    pairs: list[LogprobPair],
    grouped: dict[str, list[LogprobPair]],
    noise: float,
    bound: float,
    mean_log: float,
    p_value: float | None,
    plan: ServerPlan,
) -> RouteResult:
    drift = _drift(pairs)
    finite = [pair for pair in pairs if math.isfinite(pair.drift)]
    odd = [pair for pair in pairs if not math.isfinite(pair.drift)]
    worst = max(finite, key=lambda pair: abs(pair.drift), default=None)
    sizes = {name: rms(_drift(items)) for name, items in grouped.items() if len(_drift(items)) >= _FEWEST_UNITS}
    significant = p_value is not None and p_value <= plan.alpha
    change = None
    if route in DECODES:
        places, names = [p.position for p in finite], [p.prompt for p in finite]
        change = change_point(places, names, drift, floor=noise / MARGIN, seed=plan.seed)
    why = _beyond(route, odd, worst, sizes, bound, mean_log, p_value, plan.alpha)
    if not why and route != AGAINST and change is not None and _steps_up(change, finite, noise):
        why = (
            f"drift steps up at position {change.position}, from {change.before:.2g} to {change.after:.2g} nats, "
            f"which is more than {CONTRAST:g} times"
        )
    if odd:
        worst = odd[0]
    if why and not odd:
        worst = _first_beyond(finite, bound) or worst
    estimated = None
    if route in DECODES:
        estimated = divergence(np.array([p.value for p in finite]), np.array([p.reference for p in finite]))
    return RouteResult(
        route=route,
        n=len(pairs),
        n_prompts=len(grouped),
        typical=rms(drift),
        largest=float(np.abs(drift).max()) if drift.size else math.nan,
        noise=noise,
        bound=bound,
        ratio=math.exp(mean_log) if math.isfinite(mean_log) else math.nan,
        p_value=p_value,
        beyond=bool(why),
        within=not why and significant and mean_log < 0.0,
        why=why,
        worst=worst,
        divergence=estimated,
        change=change,
        n_nonfinite=len(odd),
    )


def _beyond(
    route: str,
    odd: list[LogprobPair],
    worst: LogprobPair | None,
    sizes: dict[str, float],
    bound: float,
    mean_log: float,
    p_value: float | None,
    alpha: float,
) -> str:
    """Return why a route is beyond its bound, empty if it is not; `sizes` is rms drift by prompt, in nats."""
    largest = max(sizes, key=lambda name: sizes[name], default=None)
    if odd:
        return f"{len(odd)} logprobs are not finite, the first at {odd[0].prompt}, position {odd[0].position}"
    if p_value is not None and p_value <= FAMILY_SHARE * alpha and mean_log > 0.0:
        return f"drift is {math.exp(mean_log):.3g} times the bound over all prompts (p = {p_value:.2g})"
    if route == AGAINST:
        return ""  # between two servers a single text that differs is not enough
    if largest is not None and sizes[largest] > PROMPT_EXTREME * bound:
        return f"the drift of {largest} is {sizes[largest] / bound:.3g} times the bound (limit {PROMPT_EXTREME:g})"
    if worst is not None and abs(worst.drift) > TOKEN_EXTREME * bound:
        return f"one token's drift is {abs(worst.drift) / bound:.3g} times the bound (limit {TOKEN_EXTREME:g})"
    return ""


def _steps_up(change: ChangePoint, pairs: list[LogprobPair], noise: float) -> bool:
    """Whether drift behind a boundary is beyond CONTRAST times the drift in front of it, on most of three or more
    prompts that reach it. Where kernels change their tiles, drift may begin, but not beyond what rounding can be."""
    limit = CONTRAST * max(change.before, noise / MARGIN)
    behind = _prompts([p for p in pairs if p.position >= change.position])
    sizes = [rms(_drift(items)) for items in behind.values() if len(items) >= _FEWEST_UNITS]
    return change.p_value <= STEP_P and len(sizes) >= 3 and 2 * sum(size > limit for size in sizes) > len(sizes)


def _first_beyond(pairs: list[LogprobPair], bound: float) -> LogprobPair | None:
    """Return the earliest token, by its index in a generation, whose drift alone is beyond the bound."""
    return min((p for p in pairs if abs(p.drift) > bound), key=lambda p: (p.index, p.prompt), default=None)


def _shift(by_route: dict[str, list[LogprobPair]]) -> int:
    values, references = [], []
    for pairs in _prompts(by_route.get(DECODE_SOLO, [])).values():
        indices = [pair.index for pair in pairs]
        if indices == list(range(indices[0], indices[0] + len(indices))):
            values.append(np.array([pair.value for pair in pairs]))
            references.append(np.array([pair.reference for pair in pairs]))
    return lag(values, references)
