"""Two engines judged as plain data, which report.json holds and the Markdown and the page read."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from kvdrift.report.view import SCHEMA_VERSION
from kvdrift.versus.outcome import DriftMap, VersusDecision
from kvdrift.versus.record import Side
from kvdrift.versus.settings import differing
from kvdrift.versus.values import relative
from kvdrift.vocabulary.address import Place
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.sites import Site

View = dict[str, Any]


def build_view(decision: VersusDecision, a: Side, b: Side, command: str | None) -> View:
    """Return the report as plain data."""
    lengths = [len(item.tokens) for item in a.prompts.values()]
    return {
        "schema_version": SCHEMA_VERSION,
        "report": "compare-engines",
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "verdict": str(decision.verdict),
        "exit_code": decision.verdict.exit_code,
        "conclusion": decision.conclusion,
        "about": f"A {a.what}, B {b.what}, both at {a.rung}; {len(lengths)} prompts of {min(lengths, default=0)} to "
        f"{max(lengths, default=0)} tokens, one row, prefill and plain decode; {decision.n_compared} addresses",
        "reasons": list(decision.reasons),
        "first_failure": None if decision.first is None else {"text": str(decision.first)},
        "guilty": decision.guilty,
        "guilty_pass": decision.guilty_pass,
        "cause": None if decision.cause is None else {"name": decision.cause[0], "text": decision.cause[1]},
        "partings": [
            {"what": item.what, "address": str(item.address), "size": item.size, "bound": item.bound, "text": str(item)}
            for item in decision.partings
        ],
        "n_layers": a.facts.n_layers,
        "maps": [_map(item) for item in decision.maps],
        "conventions": list(decision.conventions),
        "unmatched": list(decision.unmatched),
        "minimum": decision.minimum,
        "native": decision.native,
        "weights": _weights(a, b),
        "recommendations": _recommend(decision),
        "caveats": [asdict(item) for item in decision.caveats],
        "settings": _other_settings(a, b),
        "environment": {
            "kvdrift": version("kvdrift"),
            "command": command,
            "sides": {side.name: _side(side) for side in (a, b)},
        },
    }


def _map(item: DriftMap) -> View:
    first = item.first
    return {
        "what": item.what,
        "first": None if first is None else {"layer": first.layer, "site": str(first.site), "text": str(first)},
        "cells": [
            {
                "layer": cell.place.layer,
                "site": str(cell.place.site),
                "state": cell.state,
                "drift": cell.drift,
                "bound": cell.bound,
                "excess": cell.excess,
                "n": cell.n,
                "n_equal": cell.n_equal,
                "worst": str(cell.worst),
            }
            for cell in item.cells
        ],
    }


def _side(side: Side) -> View:
    return {
        "engine": side.facts.engine,
        "model": side.facts.model,
        "dtype": side.facts.dtype,
        "rung": side.rung,
        "model_hash": side.facts.model_hash,
        "noise_measured": side.is_measured,
        "versions": dict(side.facts.versions),
    }


def _weights(a: Side, b: Side) -> View:
    """Whether the weights are the same, by their hash, and the rows of the embedding as a second witness."""
    hashes = [side.facts.model_hash for side in (a, b)]
    if None in hashes:
        unknown = " and ".join(side.name for side in (a, b) if side.facts.model_hash is None)
        same, text = None, f"the hash of the weights of {unknown} is not known"
    elif hashes[0] == hashes[1]:
        same, text = True, "the bytes of all weights are the same (SHA-256)"
    else:
        same, text = None, "the bytes of the weights are not the same in the same form (SHA-256)"
    n, drift = _embedding(a, b)
    if n:
        rows = f"{n} rows of the embedding"
        text += f"; {rows} are equal" if drift == 0.0 else f"; {rows} differ by up to {drift:.2g}, relative"
        if drift > 0.0 and same is None and a.rung == b.rung:
            text += ", so that the weights, or what is done to these rows, are other ones"
    return {"same": same, "text": text, "n_rows": n, "drift": drift if n else None}


def _embedding(a: Side, b: Side) -> tuple[int, float]:
    """How many rows of the embedding both sides have at one position, and the largest difference."""
    place = Place(None, Site.EMBED_OUT)
    drifts = []
    for name in a.prompts.keys() & b.prompts.keys():
        one, two = (side.prompts[name].prefill.rows.get(place, {}) for side in (a, b))
        drifts += [relative(one[at], two[at]) for at in one.keys() & two.keys()]
    return len(drifts), max(drifts, default=0.0)


def _recommend(decision: VersusDecision) -> list[str]:
    if decision.verdict is Verdict.INCONCLUSIVE:
        return ["Do not read this as a pass.", *(f"{reason[:1].upper()}{reason[1:]}." for reason in decision.reasons)]
    if decision.verdict is not Verdict.MISMATCH:
        return [
            "Nothing that was compared calls for a fix.",
            "`kvdrift audit --scenario all` of each side looks at what this does not: batches, chunks, rewinds, and "
            "what exists at the native dtype alone.",
        ]
    if decision.guilty is not None:
        which = f"the {decision.guilty_pass} of {decision.guilty}" if decision.guilty_pass else decision.guilty
        steps = [f"Look at what {which} computes at {decision.first}: its inputs there agree with the other engine."]
        if decision.cause is not None and decision.cause[0] == "contradicts_itself":
            steps.append(f"`kvdrift audit` of {decision.guilty} tries its catalogue of causes on that place.")
        return steps
    if decision.cause is not None and decision.cause[0] == "both_contradict_themselves":
        return ["`kvdrift audit` of each side: both compute something else in decode than in prefill."]
    return [
        "Decide which of the two functions the model was trained with: both engines are consistent, and only its "
        "configuration can tell.",
        "Compare the settings and the weights of both sides at the first failure.",
    ]


def _other_settings(a: Side, b: Side) -> dict[str, list[str]]:
    return {key: [json.dumps(one), json.dumps(two)] for key, (one, two) in differing(a.settings, b.settings).items()}
