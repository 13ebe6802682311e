"""A judged server as plain data: exactly what report.json holds, and the only thing that the Markdown reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

import numpy as np

from kvdrift.server.estimates import curve
from kvdrift.server.explain import about_cache
from kvdrift.server.outcome import FIRST_TOKEN, STEP_P, RouteResult, ServerDecision
from kvdrift.server.plan import ServerPlan
from kvdrift.server.rounding import MARGIN
from kvdrift.server.values import (
    AGAINST,
    ALONE,
    DECODE_BATCHED,
    DECODE_FEW,
    DECODE_REPEAT,
    DECODE_SOLO,
    DECODE_WARM,
    DECODES,
    FORCED,
    PREFILL_PARTS,
    ROUTE_TEXT,
    Captured,
    LogprobPair,
    ServedPrompt,
    ServerFacts,
)
from kvdrift.vocabulary.evidence import Verdict

SCHEMA_VERSION = 1
View = dict[str, Any]

# Two tokens whose scores lie this many times the noise apart, or nearer, may change places by rounding alone.
_NEAR_TIE = 2.0
_MOST_TIES = 20
_WAYS = {
    DECODE_SOLO: "alone",
    DECODE_REPEAT: "the same request again",
    DECODE_WARM: "prefix cache warm",
    DECODE_FEW: "with a few neighbours in flight",
    DECODE_BATCHED: "with neighbours in flight",
}

CANNOT_SEE = (
    "Only the logprob of the sampled token is seen at each position. A fault that moves the other tokens and leaves "
    "this one is missed there.",
    "A fault that both passes share (wrong weights, a wrong RoPE base everywhere, the same wrong cache read twice) is "
    "not a difference between them.",
    "A fault below the bound is indistinguishable from rounding: one stale slot in one layer of a bfloat16 model moves "
    "logprobs as far as rounding does.",
    "Which tensor, layer or slot is wrong cannot be told from outside. `kvdrift audit` of the same model, or traces of "
    "the engine with `kvdrift judge`, tell.",
    "The tested lengths, batch sizes and cache states are those of this run. A fault that needs a longer context, an "
    "eviction or more load was not met.",
)


def build_server_view(
    captured: Captured,
    decision: ServerDecision,
    facts: ServerFacts,
    plan: ServerPlan,
    *,
    created: str,
    command: str | None,
) -> View:
    """Return the report as plain data."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": "server",
        "created": created,
        "model": facts.model,
        "verdict": str(decision.verdict),
        "exit_code": decision.verdict.exit_code,
        "conclusion": _conclusion(decision, captured, facts),
        "prefix_cache": about_cache(decision, captured),
        "power": captured.power,
        "first_failure": None if decision.first_failure is None else _pair(decision.first_failure),
        "diagnosis": decision.diagnosis,
        "reasons": [asdict(reason) for reason in decision.reasons],
        "routes": [_route(result) for result in decision.routes],
        "positive_control": None if decision.control is None else _route(decision.control),
        "noise": {
            "rounding": decision.rounding,
            "rounding_from": decision.rounding_from,
            "margin": MARGIN,
            "measured": decision.self_noise,
        },
        "minimum_detectable": decision.minimum_detectable,
        "seen_below": decision.seen_below,
        "smallest_p": decision.smallest_p,
        "curve": _curve(captured.pairs),
        "curve_bound": max((r.bound for r in decision.routes if r.route in ALONE), default=None),
        "curve_begins": _begins(decision),
        "near_ties": _near_ties(captured.pairs, decision.rounding),
        "diverged": _diverged(captured),
        "recommendations": _recommend(decision, facts),
        "cannot_see": list(CANNOT_SEE),
        "caveats": _caveats(captured, facts, decision),
        "coverage": {
            "prompts": [_prompt(prompt, captured.pairs) for prompt in captured.prompts],
            "n_asked": captured.n_asked,
            "n_unpaired": dict(captured.n_unpaired),
            "n_requests": captured.n_requests,
            "failures": dict(captured.failures),
            "n_cached": dict(captured.n_cached),
            "whole_prompts_computed": captured.n_computed_all,
        },
        "environment": {**asdict(facts), "plan": asdict(plan), "command": command, "kvdrift": version("kvdrift")},
        "pairs": [_pair(pair) for pair in captured.pairs],
    }


def _route(result: RouteResult) -> View:
    view = asdict(result)
    view["name"] = ROUTE_TEXT.get(result.route, "the first token, prefilled at another length")
    view["worst"] = None if result.worst is None else _pair(result.worst)
    view["status"] = "FAIL" if result.beyond else ("PASS" if result.within else "NOT CLEAR")
    return view


def _pair(pair: LogprobPair) -> View:
    return {**asdict(pair), "drift": pair.drift, "text": f"{pair.prompt} / position {pair.position} / {pair.route}"}


def _prompt(prompt: ServedPrompt, pairs: Sequence[LogprobPair]) -> View:
    compared = sum(p.prompt == prompt.name and p.route == DECODE_SOLO for p in pairs)
    return {"id": prompt.name, "n_tokens": prompt.n_tokens, "n_compared": compared}


def _curve(pairs: Sequence[LogprobPair]) -> View:
    found: View = {}
    for route in (*DECODES, PREFILL_PARTS):
        chosen = [p for p in pairs if p.route == route and p.index > 0 and math.isfinite(p.drift)]
        if chosen:
            bins = curve([p.position for p in chosen], np.array([p.drift for p in chosen]))
            found[route] = [asdict(item) for item in bins]
    return found


def _begins(decision: ServerDecision) -> int | None:
    """Return the position from which on drift of decode alone is larger, None if it is the same all along."""
    change = next((r.change for r in decision.routes if r.route == DECODE_SOLO), None)
    if change is not None and change.p_value <= STEP_P:
        return change.position
    return decision.seen_below


def _near_ties(pairs: Sequence[LogprobPair], noise: float) -> View:
    """Return the sampled positions where the two most likely tokens lie within noise of each other."""
    ties = [p for p in pairs if p.route == DECODE_SOLO and p.gap is not None and p.gap <= _NEAR_TIE * noise]
    known = [p for p in pairs if p.route == DECODE_SOLO and p.gap is not None]
    ties.sort(key=lambda p: p.gap or 0.0)
    return {
        "n": len(ties),
        "of": len(known),
        "within": _NEAR_TIE * noise,
        "examples": [{"prompt": p.prompt, "position": p.position, "gap": p.gap} for p in ties[:_MOST_TIES]],
    }


def _diverged(captured: Captured) -> View:
    """Return on how many prompts a route sampled other tokens than decode alone, with the same seed."""
    lengths: dict[str, int] = {}
    for pair in captured.pairs:
        if pair.route == DECODE_SOLO:
            lengths[pair.prompt] = lengths.get(pair.prompt, 0) + 1
    found: View = {}
    for (first, second), pairs in captured.decode_noise.items():
        if first == DECODE_SOLO:
            common: dict[str, int] = dict.fromkeys(lengths, 0)
            for pair in pairs:
                common[pair.prompt] = common.get(pair.prompt, 0) + 1
            found[second] = sum(common[name] < n for name, n in lengths.items())
    return found


def _conclusion(decision: ServerDecision, captured: Captured, facts: ServerFacts) -> str:
    cache = about_cache(decision, captured)
    answer = "" if cache is None else f" {cache}"
    if decision.verdict is Verdict.MISMATCH:
        failing = [r for r in decision.routes if r.beyond]
        text = "; ".join(f"{_route(r)['name']}: {r.why}" for r in failing) or str(decision.diagnosis)
        what = "the server scores its own tokens differently"
        if {r.route for r in failing} == {AGAINST}:
            what = "the server does not compute what the other server computes"
        return f"H1: {what}, and rounding cannot explain it. {text}.{answer}"
    if decision.verdict is Verdict.INCONCLUSIVE:
        return "Neither H0 nor H1: " + "; ".join(reason.text for reason in decision.reasons) + f".{answer}"
    return f"H0: {_claim(decision, captured, facts)}{answer} {_seen(decision)}"


def _claim(decision: ServerDecision, captured: Captured, facts: ServerFacts) -> str:
    """Return the sentence that says what a pass is about."""
    ways = [text for route, text in _WAYS.items() if any(r.route == route and r.n for r in decision.routes)]
    if captured.n_cached.get(DECODE_WARM) == 0 and _WAYS[DECODE_WARM] in ways:
        ways.remove(_WAYS[DECODE_WARM])
    places = [p.position for p in captured.pairs if p.route in DECODES]
    weights = f", {facts.weights} weights" if facts.weights else ""
    elsewhere = " and by the other server" if any(p.route == AGAINST for p in captured.pairs) else ""
    return (
        f"decode ({', '.join(ways)}) and prefill of this server ({facts.dialect}{weights}) score the sampled tokens at "
        f"positions {min(places)} to {max(places)} alike{elsewhere}, up to rounding."
    )


def _seen(decision: ServerDecision) -> str:
    """Return what a pass would have seen, and where it would have seen less."""
    smallest, below = decision.minimum_detectable, decision.seen_below
    text = f"Drift of decode alone by more than {smallest:.2g} nats (rms) would have been seen"
    if below is not None:
        bound = max(r.bound for r in decision.routes if r.route in ALONE)
        text += (
            f" up to position {below - 1}; from {below} on prefill is not always equal to itself, and drift of "
            f"more than {bound:.2g} nats would have been seen"
        )
    few = next((r for r in decision.routes if r.route == DECODE_FEW), None)
    if few is not None:
        text += f"; so would drift of more than {few.bound:.2g} nats beside a few neighbours"
    return f"{text}; what is smaller, or does not show in logprobs, would not."


def _recommend(decision: ServerDecision, facts: ServerFacts) -> list[str]:
    if decision.verdict is Verdict.MISMATCH:
        steps = []
        if decision.shift:
            steps.append("Check first how the server places its logprobs; then audit again.")
        return [
            *steps,
            "Find the tensor: audit the same weights with `kvdrift audit`, or write traces out of the engine and judge "
            "them with `kvdrift judge`.",
            f"Run again with one thing changed at a time: {facts.changes}. The routes above say which of them matters.",
            "Do not widen a tolerance: rounding, and a margin on it, were allowed for already.",
        ]
    if decision.verdict is Verdict.INCONCLUSIVE:
        return [
            *dict.fromkeys(f"{reason.remedy[0].upper()}{reason.remedy[1:]}." for reason in decision.reasons),
            "Do not read this run as a pass.",
        ]
    return [
        "Nothing to fix that logprobs could show. For faults inside the model, audit the weights with `kvdrift audit`.",
    ]


def _caveats(captured: Captured, facts: ServerFacts, decision: ServerDecision) -> list[View]:
    found = []

    def add(code: str, text: str) -> None:
        found.append({"code": code, "text": text})

    if facts.dtype is None:
        add("DTYPE_UNKNOWN", f"The server does not tell its dtype: {decision.rounding_from}.")
    elif facts.dtype_from == "--dtype":
        add("DTYPE_TOLD", f"That the server computes in {facts.dtype} was said by --dtype, and was not verified.")
    for text in facts.lacks:
        add("NOT_OFFERED", f"This server lacks {text}.")
    for route, text in captured.absent.items():
        add("NOT_OFFERED", f"{ROUTE_TEXT.get(route, route)}: {text}.")
    for route, text in captured.failures.items():
        add("NOT_RUN", f"{ROUTE_TEXT.get(route, route)}: {text}.")
    for why, count in captured.n_unpaired.items():
        add("TRACE_OFFSET", f"{count} of {captured.n_asked} tokens were not compared: {why}.")
    if captured.n_cached.get("decode_warm") == 0:
        add("CACHE_COLD", "The server reported no prefix-cache hit, so a warm prefix cache was not tested.")
    elif "decode_warm" not in captured.n_cached:
        add(
            "CACHE_UNKNOWN",
            "The server does not report prefix-cache hits: whether the warm route met one is unknown.",
        )
    for result in decision.routes:
        if result.n_nonfinite:
            add("NON_FINITE", f"{result.n_nonfinite} logprobs of {result.route} are not finite.")
    for r in decision.routes:
        if r.route in (DECODE_WARM, DECODE_BATCHED) and r.bound > (decision.minimum_detectable or 0.0):
            text = f"{ROUTE_TEXT[r.route]}: drift below {r.bound:.2g} nats (rms) cannot be told from rounding there."
            add("LESS_SEEN", text[0].upper() + text[1:])
    if any(r.route == FIRST_TOKEN and r.largest == 0.0 for r in decision.routes) and not any(
        r.route == FORCED for r in decision.routes
    ):
        add("NO_SELF_NOISE", "Prefill at another length gave the same digits; the noise is that of the dtype alone.")
    add("LOGPROBS_ONLY", "Nothing inside the server was seen.")
    return found
