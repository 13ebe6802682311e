"""What a judged server's routes point at, and what keeps a server without a mismatch from passing."""

from __future__ import annotations

import math

from kvdrift.server.outcome import CONTRAST, STEP_P, Reason, RouteResult, ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.values import DECODE_BATCHED, DECODE_SOLO, DECODE_WARM, DECODES, ROUTE_TEXT, Captured, ServerFacts


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
    if not beyond & set(DECODES):
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
            continue  # without it the bound is that of the dtype alone, which is not larger
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
