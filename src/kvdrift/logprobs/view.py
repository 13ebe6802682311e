"""Judged dumps as plain data, which report.json holds and the Markdown reads, and as the screen that is printed."""

from __future__ import annotations

import math
from dataclasses import asdict
from importlib.metadata import version
from typing import Any

from kvdrift.logprobs.dump import Dump
from kvdrift.logprobs.outcome import LogprobDecision, LogprobPlan, SequenceResult
from kvdrift.vocabulary.evidence import Verdict

SCHEMA_VERSION = 1
View = dict[str, Any]
_MOST_SHOWN = 12

CANNOT_SEE = (
    "Tokens that were not sampled. There is one logprob a position.",
    "What both sides share: the same wrong weights, the same wrong template.",
    "A fault below the bound, such as weights that one small step of training has changed, at bfloat16.",
    "The tensor, layer or slot. `kvdrift compare` of two engines or of their traces, and `kvdrift audit`, tell.",
)


def build_view(
    decision: LogprobDecision, dumps: dict[str, Dump | None], plan: LogprobPlan, *, created: str, command: str | None
) -> View:
    """Return the report as plain data."""
    first = decision.first
    return {
        "schema_version": SCHEMA_VERSION,
        "report": "compare-logprobs",
        "created": created,
        "verdict": str(decision.verdict),
        "conclusion": decision.conclusion,
        "reasons": list(decision.reasons),
        "about": _about(decision, dumps),
        "first_failure": None
        if first is None
        else {"sequence": first.name, "token": _from(first), "text": _place(first)},
        "cause": None if decision.cause is None else asdict(decision.cause),
        "guilty": None if decision.guilt is None else asdict(decision.guilt),
        "estimates": {name: asdict(getattr(decision.estimates, name)) for name in ("k1", "k3", "chi2", "ratio")},
        "typical_nats": decision.typical,
        "noise": {**asdict(decision.noise), "bound": decision.noise.bound},
        "test": {
            "ratio": decision.ratio,
            "p_value": decision.p_value,
            "smallest_p": decision.smallest_p,
            "alpha": decision.alpha,
            "unit": "sequence",
        },
        "drop": _drop(decision),
        "along": [asdict(item) for item in decision.along],
        "sequences": [asdict(item) for item in decision.sequences],
        "n_tokens": decision.n_tokens,
        "n_nonfinite": decision.n_nonfinite,
        "lost": decision.lost,
        "ties": None if decision.ties is None else asdict(decision.ties),
        "flips": None if decision.flips is None else asdict(decision.flips),
        "caveats": [asdict(item) for item in decision.caveats],
        "cannot_see": list(CANNOT_SEE),
        "recommendations": _recommend(decision, has_third=dumps.get("third") is not None),
        "environment": {
            "kvdrift": version("kvdrift"),
            "command": command,
            "plan": asdict(plan),
            "dumps": {
                name: {
                    "source": dump.source,
                    "n_sequences": len(dump.names),
                    "n_tokens": dump.n_tokens,
                    "rounded_to": dump.grain_text,
                }
                for name, dump in dumps.items()
                if dump is not None
            },
        },
    }


def screen(view: View) -> list[str]:
    """Return what is printed: the verdict, who is off, what the mask drops, in about twenty lines."""
    estimates, drop = view["estimates"], view["drop"]
    lines = [f"{view['verdict']}: {view['conclusion']}", f"  about: {view['about']}"]
    if view["first_failure"]:
        lines.append(f"  first failure: {view['first_failure']['text']}")
    if view["cause"]:
        lines.append(f"  cause: {view['cause']['name']}: {view['cause']['text']}")
    if view["guilty"]:
        lines.append(f"  who is off: {view['guilty']['text']}")
    lines.append(f"  mask: {drop['text']}")
    level = estimates["k3"]["level"]
    lines.append(
        f"  per token, {level:.0%} intervals over sequences: "
        + ", ".join(
            f"{title} {interval(estimates[key])}" for key, title in (("k1", "K1"), ("k3", "K3"), ("chi2", "chi2"))
        )
    )
    lines.append(
        f"  rounding: {view['noise']['bound']:.2g} (1 - p) nats at most ({view['noise']['margin']:g} times "
        f"{view['noise']['sigma']:.2g}: {view['noise']['source']}); drift is {view['test']['ratio']:.2g} times that"
    )
    if view["ties"]:
        ties = view["ties"]
        lines.append(
            f"  likeliest token changed at {ties['n_moved']} of {ties['n_known']} tokens, {ties['n_moved_near']} of "
            f"them near ties ({ties['n_near']} tokens are)"
        )
    if view["flips"]:
        flips = view["flips"]
        lines.append(
            f"  other experts at {flips['n']} of {flips['n_tokens']} tokens, which are left out of the verdict: K3 "
            f"{_value(flips['k3_with'])} there, {_value(flips['k3_without'])} elsewhere"
        )
    lines += [f"  - {line}" for line in view["recommendations"]]
    return lines


def interval(estimate: View) -> str:
    """Return an estimate with its interval."""
    return f"{estimate['value']:.2g} [{estimate['low']:.2g}, {estimate['high']:.2g}]"


def _value(estimate: View | None) -> str:
    return "none" if estimate is None else f"{estimate['value']:.2g}"


def _about(decision: LogprobDecision, dumps: dict[str, Dump | None]) -> str:
    a, b = dumps["A"], dumps["B"]
    assert a is not None
    assert b is not None
    return (
        f"{decision.n_tokens} tokens of {len(decision.sequences)} sequences, A {a.source} and B {b.source}, by the "
        "logprobs of the sampled tokens alone"
    )


def _from(item: SequenceResult) -> int:
    return item.largest_at if item.change is None else item.change


def _place(item: SequenceResult) -> str:
    where = f"from token {item.change} on" if item.change is not None else f"largest at token {item.largest_at}"
    return f"sequence {item.name}, {where}: {item.why}"


def _drop(decision: LogprobDecision) -> View:
    dropped = decision.dropped
    n, of = len(dropped), len(decision.sequences)
    rounding = sum(not item.beyond for item in dropped)
    missed = sum(item.beyond and not item.dropped for item in decision.sequences)
    if not n:
        text = f"it drops none of {of} sequences ({decision.rule})"
    else:
        text = (
            f"of the {n / of:.0%} that it drops ({n} of {of}; {decision.rule}), {rounding / n:.0%} are within rounding "
            f"({rounding} of {n})"
        )
    if missed:
        text += f"; it keeps {missed} that are beyond"
    return {"rule": decision.rule, "n": n, "of": of, "n_rounding": rounding, "n_missed": missed, "text": text}


def _recommend(decision: LogprobDecision, *, has_third: bool) -> list[str]:
    if decision.verdict is Verdict.INCONCLUSIVE:
        return ["Do not read this as a pass."]
    if decision.verdict is Verdict.STRUCTURAL_DRIFT:
        return ["Do not drop sequences for this drift; a mask that drops them costs data and mends nothing."]
    steps = []
    if not has_third:
        steps.append(
            "Score the same tokens with A's engine in one prefill and pass them as --third: it tells who is off."
        )
    steps.append(
        "Find the tensor: `kvdrift compare` the two engines or their traces, or `kvdrift audit` the one that is off."
    )
    return steps


def shown(view: View) -> list[View]:
    """Return the sequences for the table of the report: those beyond rounding first, then the largest."""
    ordered = sorted(
        view["sequences"],
        key=lambda item: (not item["beyond"], -item["ratio"] if not math.isnan(item["ratio"]) else 0.0),
    )
    return ordered[:_MOST_SHOWN]
