"""What a judged server's routes point at, and what keeps a server without a mismatch from passing."""

from __future__ import annotations

import math

from kvdrift.server.outcome import CONTRAST, STEP_P, Reason, RouteResult, ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.rounding import DIGITS
from kvdrift.server.values import (
    AGAINST,
    CUT,
    DECODE_BATCHED,
    DECODE_FEW,
    DECODE_SOLO,
    DECODE_WARM,
    DECODES,
    ENDED,
    FORCED,
    GENERATION,
    PREFILL_PARTS,
    ROUTE_TEXT,
    Captured,
    ServerFacts,
)
from kvdrift.vocabulary.evidence import Verdict


def diagnose(decision: ServerDecision) -> str | None:
    """Say in words which routes are affected, and what that points at."""
    beyond = {r.route for r in decision.routes if r.beyond}
    decodes = [r for r in decision.routes if r.route in DECODES]
    if decision.shift:
        side = "next" if decision.shift > 0 else "previous"
        return (
            f"the scores of decode fit prefill's if each is paired with the {side} token: logprobs are displaced by "
            "one token in one of the two answers, which is a fault of reporting and need not be one of computing"
        )
    if beyond == {AGAINST}:
        return (
            "decode agrees with prefill, and prefill does not agree with that of the other server: another type of "
            "cache (--cache-type-k, --cache-type-v), other weights, or another kernel"
        )
    if beyond == {GENERATION}:
        return (
            "decode differs from the same tokens forced one by one on the same rows: what decode adds to a step is "
            "affected, such as which token it feeds, at which position, and which cache rows it reads"
        )
    if FORCED in beyond and not beyond & {GENERATION}:
        return (
            "single steps are affected, asked for from outside as well as in decode: the kernels for one row, or the "
            "cache rows that they read"
        )
    if not beyond & {GENERATION, *DECODES}:
        return "decode agrees with prefill; it is prefill that does not agree with itself: " + ", ".join(
            ROUTE_TEXT.get(route, "the first token, prefilled at another length") for route in sorted(beyond)
        )
    if decodes and all(r.beyond for r in decodes):
        change = decodes[0].change
        if change is not None and change.p_value <= STEP_P and change.after > CONTRAST * change.before:
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


def doubts_of(decision: ServerDecision, captured: Captured, facts: ServerFacts, plan: ServerPlan) -> list[Reason]:
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
            if r.route in (FORCED, *DECODES, AGAINST) and not r.within:
                doubts.append(
                    Reason(
                        f"{ROUTE_TEXT[r.route]}: drift is {r.ratio:.2g} times the bound over all prompts, neither "
                        "beyond it nor clearly within it",
                        "use more prompts or longer generations (--span 64)",
                    )
                )
    few = results.get(DECODE_FEW)
    if few is not None and not few.within:
        doubts.append(
            Reason(
                f"{ROUTE_TEXT[DECODE_FEW]}: so few rows leave prefill the same in every digit, and drift of decode is "
                f"up to {few.largest:.2g} nats, so that an error of {plan.resolution:g} could hide in it",
                f"find out what neighbours change ({facts.changes}), or accept it with --resolution "
                f"{max(few.largest, plan.resolution):.2g}",
            )
        )
    generation = results.get(GENERATION)
    if generation is not None and not generation.within:
        doubts.append(
            Reason(
                f"{ROUTE_TEXT[GENERATION]}: neither alike in all texts nor different in enough of them (drift up to "
                f"{generation.largest:.2g} nats, bound {generation.bound:.2g})",
                "allow more requests (--max-requests 1000)",
            )
        )
    for route, failure in captured.failures.items():
        if route == "self_noise":
            continue  # without it the bound is that of the dtype alone, which is not larger
        doubts.append(Reason(f"{ROUTE_TEXT.get(route, route)}: {failure}", "run again when that is settled"))
    for why, count in captured.n_unpaired.items():
        # A text that ended is shorter, and every token of it was compared.
        if why not in (ENDED, CUT):
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
        remedy = f"{facts.finest} and run again" + ("" if facts.weights else " with --dtype float32")
        if facts.dtype is None and facts.weights is None:
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


def about_cache(decision: ServerDecision, captured: Captured) -> str | None:
    """Answer whether logprobs that change with the prefix cache are a bug or noise; None if that was not tried."""
    warm = next((r for r in decision.routes if r.route == DECODE_WARM), None)
    if warm is None or not warm.n:
        return None
    if captured.n_cached.get(DECODE_WARM) == 0:
        return "Of the prefix cache nothing was seen: the server took no token from it."
    moved = [p.size for p in captured.decode_noise.get((DECODE_SOLO, DECODE_WARM), []) if p.size > DIGITS]
    n = len(captured.decode_noise.get((DECODE_SOLO, DECODE_WARM), []))
    if warm.beyond:
        return f"With the prefix cache on, logprobs change beyond noise: that is a bug. {_capital(warm.why)}."
    if not moved:
        return f"With the prefix cache on, logprobs stay the same in every digit ({n} tokens)."
    if decision.verdict is Verdict.MISMATCH:
        return f"With the prefix cache on, {len(moved)} of {n} logprobs change; whether that is a bug or noise is open."
    size = math.sqrt(sum(m**2 for m in moved) / len(moved))
    text = f"With the prefix cache on, {len(moved)} of {n} logprobs change, by {size:.2g} nats (rms)"
    if not warm.within:
        return f"{text}; whether that is a bug or noise stays open."
    parts = next((r for r in decision.routes if r.route == PREFILL_PARTS), None)
    why = "the prompt is then computed in products of other shapes"
    if parts is not None and parts.largest > DIGITS:
        why += f"; a prefill that is merely cut in two differs from itself by up to {parts.largest:.2g} nats as well"
    return f"{text}: noise, and not a bug, since {why}."


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
