"""From pairs of logprobs to a verdict: what noise can be on this server, what goes beyond it, and what would be seen.

docs/engines/server.md has the reasoning; the numbers here have their sources there.
"""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np

from kvdrift.server.estimates import ChangePoint, Divergence, Floats, change_point, divergence, lag, rms
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import (
    DECODE_BATCHED,
    DECODE_SOLO,
    DECODE_WARM,
    DECODES,
    PREFILLS,
    ROUTE_TEXT,
    SPOILED,
    Captured,
    Pair,
    ServerFacts,
)
from kvdrift.stats import sign_flip_max_t
from kvdrift.verdict.model import Verdict

# The first generated token comes out of the prefill in both passes, only at another length.
FIRST_TOKEN = "first_token"

# Typical (rms) difference of a logprob between two right kernels, in nats, by the dtype of activations: the larger of
# what clean engines showed (docs/engines/server.md, "How large rounding is").
ROUNDING = {"float32": 1e-5, "float16": 1e-2, "bfloat16": 6e-2}
# Activations rounded to 8 bits in blocks, whatever the dtype, as llama.cpp does with quantised weights.
QUANTISED = 0.15
# Drift up to so many times the noise is taken for rounding: two bits more lost by one kernel than by another.
MARGIN = 4.0
# The drift of a decode route may be so many times the drift of decode alone, and drift behind a boundary so many times
# the drift in front of it; neither is taken for less than a quarter of the rounding. It is the same two kernels.
CONTRAST = 8.0
# A single prompt, or a single token, beyond these multiples of the bound needs no company.
PROMPT_EXTREME, TOKEN_EXTREME = 4.0, 16.0
# The log of drift over bound is limited to this, so that one prompt of zero drift does not swamp the others.
_LOG_LIMIT = math.log(64.0)
# Prompts that the sign-flip test needs before it can reach alpha = 0.001 are 11; fewer never suffice for anything.
_FEWEST_PROMPTS = 2
# The smallest p-value of a change point is 0.001.
_STEP_P = 0.01
_FEWEST_UNITS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteResult:
    """One route against the reference.

    `typical` is the rms drift over all prompts and `largest` the largest single one, in nats; `bound` is what noise
    allows.
    `ratio` is the geometric mean over prompts of rms drift over bound, with the p-value of its being 1. `worst` is the
    pair with the largest drift.
    """

    route: str
    n: int
    n_prompts: int
    typical: float
    largest: float
    noise: float
    bound: float
    ratio: float
    p_value: float | None
    beyond: bool
    within: bool
    why: str
    worst: Pair | None
    divergence: Divergence | None
    change: ChangePoint | None
    n_nonfinite: int


@dataclass(frozen=True, slots=True)
class Reason:
    """Why there is no verdict, and what would settle it."""

    text: str
    remedy: str


@dataclass(slots=True)
class ServerDecision:
    """The judgement of one server."""

    verdict: Verdict
    routes: list[RouteResult]
    control: RouteResult | None
    rounding: float
    rounding_from: str
    reasons: list[Reason] = field(default_factory=list)
    diagnosis: str | None = None
    shift: int = 0
    self_noise: dict[str, float] = field(default_factory=dict)
    smallest_p: float | None = None

    @property
    def first_failure(self) -> Pair | None:
        """The earliest pair beyond noise on the first route that is beyond it."""
        result = next((r for r in self.routes if r.beyond), None)
        return None if result is None else result.worst

    @property
    def minimum_detectable(self) -> float | None:
        """The largest bound of the decode routes, in nats rms: what is smaller may be there unseen."""
        return max((r.bound for r in self.routes if r.route in DECODES), default=None)


def judge(captured: Captured, facts: ServerFacts, plan: ServerPlan) -> ServerDecision:
    """Judge what was captured."""
    by_route = _by_route(captured)
    rounding, source = rounding_of(facts)
    noises = {route: rms(_drift(by_route[route])) for route in (FIRST_TOKEN, *PREFILLS) if by_route.get(route)}
    order = [FIRST_TOKEN, *PREFILLS, *DECODES]
    # Prefill variants first, against rounding alone: one that goes beyond it must not be the noise of decode.
    results: list[RouteResult] = []
    for family in ((FIRST_TOKEN, *PREFILLS), DECODES):
        present = [route for route in family if by_route.get(route)]
        measured = (
            [] if family is not DECODES else [r.typical for r in results if not r.beyond and r.typical <= r.bound]
        )
        noise = max([rounding, *measured])
        bounds = dict.fromkeys(present, MARGIN * noise)
        if family is DECODES and DECODE_SOLO in present:
            like_solo = CONTRAST * max(rms(_drift(by_route[DECODE_SOLO])), rounding / MARGIN)
            bounds |= {route: min(bounds[route], like_solo) for route in present if route != DECODE_SOLO}
        results += _test(present, by_route, noise, bounds, captured, plan)
    results.sort(key=lambda r: order.index(r.route))
    control = None
    if by_route.get(SPOILED):
        noise = max((r.noise for r in results), default=rounding)
        control = _test([SPOILED], by_route, noise, {SPOILED: MARGIN * noise}, captured, plan)[0]
    shift = _shift(by_route)
    decision = ServerDecision(
        Verdict.INCONCLUSIVE,
        results,
        control,
        rounding,
        source,
        self_noise=noises | {f"{a} / {b}": rms(_drift(p)) for (a, b), p in captured.decode_noise.items() if p},
        smallest_p=2.0 ** (1 - len(captured.prompts)),
    )
    decision.shift = shift
    if shift or any(r.beyond for r in results):
        decision.verdict = Verdict.MISMATCH
        decision.diagnosis = _diagnose(decision)
        return decision
    decision.reasons = _doubts(decision, captured, facts, plan)
    if not decision.reasons:
        decision.verdict = Verdict.STRUCTURAL_DRIFT
    return decision


def rounding_of(facts: ServerFacts) -> tuple[float, str]:
    """Return the typical rounding of a logprob on this server, in nats, and where the figure comes from."""
    if facts.dtype is None:
        if facts.dialect.startswith("llama"):
            return QUANTISED, "the dtype is unknown; taken as activations rounded to 8 bits, as with quantised weights"
        return ROUNDING["bfloat16"], "the dtype is unknown; taken as bfloat16"
    size, text = ROUNDING[facts.dtype], f"{facts.dtype}, said by {facts.dtype_from}"
    if facts.quantised and size < QUANTISED:
        return QUANTISED, f"{text}, with quantised weights: activations may be rounded to 8 bits"
    return size, text


def _by_route(captured: Captured) -> dict[str, list[Pair]]:
    """Return pairs by route; generated tokens with index 0 are no decode steps."""
    found: dict[str, list[Pair]] = defaultdict(list)
    for pair in captured.pairs:
        if pair.route in DECODES and pair.index == 0:
            if pair.route == DECODE_SOLO:
                found[FIRST_TOKEN].append(pair)
            continue
        found[pair.route].append(pair)
    return found


def _drift(pairs: list[Pair]) -> Floats:
    """Return the drift of pairs; those that are not finite are judged by themselves, and are left out here."""
    values = np.array([pair.drift for pair in pairs], dtype=np.float64)
    return np.asarray(values[np.isfinite(values)])


def _prompts(pairs: list[Pair]) -> dict[str, list[Pair]]:
    found: dict[str, list[Pair]] = defaultdict(list)
    for pair in pairs:
        found[pair.prompt].append(pair)
    return found


def _test(
    routes: list[str],
    by_route: dict[str, list[Pair]],
    noise: float,
    bounds: dict[str, float],
    captured: Captured,
    plan: ServerPlan,
) -> list[RouteResult]:
    """Test some routes together: one max-T test over all of them, and the rules for what needs no test."""
    names = [prompt.name for prompt in captured.prompts]
    grouped = {route: _prompts(by_route[route]) for route in routes}
    # The unit of the permutation is the prompt; one that a route lacks is left out of the test for all of them.
    needed = {route: 1 if route == FIRST_TOKEN else _FEWEST_UNITS for route in routes}
    complete = [
        name for name in names if all(len(_drift(grouped[route].get(name, []))) >= needed[route] for route in routes)
    ]
    logs = np.array(
        [[_log_ratio(grouped[route][name], bounds[route]) for name in complete] for route in routes], dtype=np.float64
    ).reshape(len(routes), len(complete))
    p_values: list[float | None] = [None] * len(routes)
    if len(complete) >= _FEWEST_PROMPTS and routes:
        p_values = [float(p) for p in sign_flip_max_t(logs, seed=plan.seed).p_values]
    results = []
    for row, route in enumerate(routes):
        mean = float(logs[row].mean()) if complete else math.nan
        results.append(_result(route, by_route[route], grouped[route], noise, bounds[route], mean, p_values[row], plan))
    return results


def _log_ratio(pairs: list[Pair], bound: float) -> float:
    size = rms(_drift(pairs))
    return float(np.clip(math.log(size / bound), -_LOG_LIMIT, _LOG_LIMIT)) if size > 0.0 else -_LOG_LIMIT


def _result(
    route: str,
    pairs: list[Pair],
    grouped: dict[str, list[Pair]],
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
    largest_prompt = max(sizes, key=lambda name: sizes[name], default=None)
    significant = p_value is not None and p_value <= plan.alpha
    change = None
    if route in DECODES:
        places, names = [p.position for p in finite], [p.prompt for p in finite]
        change = change_point(places, names, drift, floor=noise / MARGIN, seed=plan.seed)
    why = ""
    if odd:
        why = f"{len(odd)} logprobs are not finite, the first at {odd[0].prompt}, position {odd[0].position}"
        worst = odd[0]
    elif significant and mean_log > 0.0:
        why = f"drift is {math.exp(mean_log):.3g} times the bound over all prompts (p = {p_value:.2g})"
    elif largest_prompt is not None and sizes[largest_prompt] > PROMPT_EXTREME * bound:
        times = sizes[largest_prompt] / bound
        why = f"the drift of {largest_prompt} is {times:.3g} times the bound (limit {PROMPT_EXTREME:g})"
    elif worst is not None and abs(worst.drift) > TOKEN_EXTREME * bound:
        why = f"one token's drift is {abs(worst.drift) / bound:.3g} times the bound (limit {TOKEN_EXTREME:g})"
    elif change is not None and _steps_up(change, finite, noise):
        why = (
            f"drift steps up at position {change.position}, from {change.before:.2g} to {change.after:.2g} nats, "
            f"which is more than {CONTRAST:g} times"
        )
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


def _steps_up(change: ChangePoint, pairs: list[Pair], noise: float) -> bool:
    """Whether drift behind a boundary is beyond CONTRAST times the drift in front of it, on most of three or more
    prompts that reach it. Where kernels change their tiles, drift may begin, but not beyond what rounding can be."""
    limit = CONTRAST * max(change.before, noise / MARGIN)
    behind = _prompts([p for p in pairs if p.position >= change.position])
    sizes = [rms(_drift(items)) for items in behind.values() if len(items) >= _FEWEST_UNITS]
    return change.p_value <= _STEP_P and len(sizes) >= 3 and 2 * sum(size > limit for size in sizes) > len(sizes)


def _first_beyond(pairs: list[Pair], bound: float) -> Pair | None:
    """Return the earliest token, by its index in a generation, whose drift alone is beyond the bound."""
    return min((p for p in pairs if abs(p.drift) > bound), key=lambda p: (p.index, p.prompt), default=None)


def _shift(by_route: dict[str, list[Pair]]) -> int:
    values, references = [], []
    for pairs in _prompts(by_route.get(DECODE_SOLO, [])).values():
        indices = [pair.index for pair in pairs]
        if indices == list(range(indices[0], indices[0] + len(indices))):
            values.append(np.array([pair.value for pair in pairs]))
            references.append(np.array([pair.reference for pair in pairs]))
    return lag(values, references)


def _diagnose(decision: ServerDecision) -> str | None:
    """Say in words which routes are affected, and what that points at."""
    beyond = {r.route for r in decision.routes if r.beyond}
    decodes = [r for r in decision.routes if r.route in DECODES]
    if decision.shift:
        side = "next" if decision.shift > 0 else "previous"
        return (
            f"the scores of decode fit prefill's if each is paired with the {side} token: logprobs are displaced by "
            "one token in one of the two answers, which is a fault of reporting and need not be one of computing"
        )
    if not beyond & set(DECODES):
        return "decode agrees with prefill; it is prefill that does not agree with itself: " + ", ".join(
            ROUTE_TEXT.get(route, "the first token, prefilled at another length") for route in sorted(beyond)
        )
    if decodes and all(r.beyond for r in decodes):
        change = decodes[0].change
        if change is not None and change.p_value <= _STEP_P and change.after > CONTRAST * change.before:
            return (
                f"every decode route is affected, from position {change.position} on (drift {change.before:.2g} nats "
                f"before it, {change.after:.2g} after): look at what changes over there: pages, tiles, windows"
            )
        return "every decode route is affected: the decode step itself, or what it reads from the cache"
    if beyond & set(DECODES) == {DECODE_BATCHED}:
        return "only decode with neighbours in flight is affected: batching, padding or the slots of other requests"
    if beyond & set(DECODES) == {DECODE_WARM}:
        return "only decode on a warm prefix cache is affected: what the prefix cache hands out"
    return "some decode routes are affected: " + ", ".join(ROUTE_TEXT[r] for r in DECODES if r in beyond)


def _doubts(decision: ServerDecision, captured: Captured, facts: ServerFacts, plan: ServerPlan) -> list[Reason]:
    """Return what keeps a server without a mismatch from passing."""
    doubts = []
    results = {r.route: r for r in decision.routes}
    solo = results.get(DECODE_SOLO)
    if solo is None or not solo.n:
        return [Reason("no decoded token was compared", "use longer generations (--span 32) and check the prompts")]
    n_prompts = len(captured.prompts)
    if decision.smallest_p is not None and decision.smallest_p > plan.alpha:
        fewest = math.ceil(1 - math.log2(plan.alpha))
        doubts.append(
            Reason(
                f"{n_prompts} prompts cannot reach alpha {plan.alpha:g}",
                f"use at least {fewest} prompts, or a larger --alpha",
            )
        )
    else:
        for r in decision.routes:
            if r.route in DECODES and not r.within:
                doubts.append(
                    Reason(
                        f"{ROUTE_TEXT[r.route]}: drift is {r.ratio:.2g} times the bound over all prompts, neither "
                        "beyond it nor clearly within it",
                        "use more prompts or longer generations (--span 64)",
                    )
                )
    for route, failure in captured.failures.items():
        if route == "self_noise":
            continue  # without it the bound is that of the dtype alone, which is no larger
        doubts.append(Reason(f"{ROUTE_TEXT.get(route, route)}: {failure}", "run again when that is settled"))
    for why, count in captured.n_unpaired.items():
        # A text that ended is shorter, and every token of it was compared.
        if why != "the model ended the text":
            doubts.append(Reason(f"TRACE_OFFSET: {count} tokens have no partner: {why}", "use other prompts"))
    doubts += _blind(decision, captured, facts, plan, solo)
    return doubts


def _blind(
    decision: ServerDecision, captured: Captured, facts: ServerFacts, plan: ServerPlan, solo: RouteResult
) -> list[Reason]:
    """Return why this audit could not have seen a fault."""
    doubts = []
    control = decision.control
    if control is None or not control.beyond:
        doubts.append(
            Reason(
                "the positive control was not seen: with one prompt token replaced, the scores "
                + ("were not measured" if control is None else f"moved by {control.typical:.2g} nats only"),
                "use prompts whose tokens matter to what follows",
            )
        )
    smallest = decision.minimum_detectable
    if smallest is not None and smallest > plan.resolution:
        remedy = "serve the model in float32 and run again with --dtype float32"
        if facts.dtype is None:
            remedy = "name the dtype that the server computes in (--dtype), and best " + remedy
        doubts.append(
            Reason(
                f"drift below {smallest:.2g} nats (rms) cannot be told from rounding here, and a pass must rule out "
                f"{plan.resolution:g} nats",
                f"{remedy}; or accept this with --resolution {smallest:.2g}",
            )
        )
    exact = [r for r in decision.routes if r.route in DECODES and r.largest == 0.0]
    if len(exact) == sum(r.route in DECODES for r in decision.routes) and not captured.n_computed_all:
        doubts.append(
            Reason(
                "decode and prefill agree in every digit, and nothing shows that prefill was computed at all: the "
                "server may have answered from what decode left behind",
                "ask a server that reports what it computed, or switch its prefix cache off",
            )
        )
    return doubts
