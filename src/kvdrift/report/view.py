"""A judged run as plain data: exactly what report.json holds, and the only thing that other renderings read."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

import msgspec

from kvdrift.diagnosis.diagnose import Explained
from kvdrift.measure.attention import RunningStats
from kvdrift.measure.measured import Measured
from kvdrift.report.about import about, command_for_all
from kvdrift.report.lengths import build_lengths_view
from kvdrift.report.recommend import recommend
from kvdrift.verdict.coverage import Chain
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.guilty import guilty_prefill
from kvdrift.verdict.judge import Judged
from kvdrift.verdict.strip import strip_of
from kvdrift.verdict.summary import Coverage, ModeFigures, Summary
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.evidence import CHOICE, CONTROL_SEEN, Evidence, ModeOutcome, Verdict
from kvdrift.vocabulary.facts import Call

SCHEMA_VERSION = 1
# History of the report's schema:
#   1  first version

View = dict[str, Any]


def build_view(judged: Judged, runs: Sequence[Measured] = (), not_run: Sequence[str] = ()) -> View:
    """Return the report of a route as plain data.

    Args:
        judged: the route that decides.
        runs: all routes that the verdict is about, if they are several.
        not_run: scenarios that could have been run beside them.
    """
    what = about(runs or [judged.measured])
    run, decision, explained, summary = judged.measured, judged.decision, judged.explained, judged.summary
    return {
        "schema_version": SCHEMA_VERSION,
        "created": run.created,
        "model": run.info.model,
        "verdict": str(decision.verdict),
        "kind": decision.kind,
        "scope": decision.scope or None,
        "exit_code": decision.verdict.exit_code,
        "first_failure": _address(decision.first_failure, decision.first_slot),
        "diagnosis": _diagnosis(explained),
        "reasons": list(decision.reasons),
        "lengths": build_lengths_view(judged),
        "strip": [asdict(mark) for mark in strip_of(judged)],
        "modes": {outcome.mode: _mode(outcome) for outcome in sorted(decision.outcomes, key=lambda o: o.mode)},
        "projection_hashes": [asdict(item) for item in summary.projections],
        "attention_stats": _attention_stats(summary),
        "kv_alignment": {mode: _alignment(figures) for mode, figures in summary.modes.items()},
        "about": what,
        "hypotheses": _hypotheses(run, decision, summary, what),
        "recommendations": recommend(decision, judged.diagnosis, what, _not_run(run, not_run)),
        "instruments": [_evidence(item) for item in decision.evidence],
        "coverage": _coverage(run, decision, summary.coverage),
        "caveats": [asdict(caveat) for caveat in decision.caveats],
        "environment": _environment(run),
    }


def to_strict_json(view: View) -> str:
    """Return `view` as JSON that any parser accepts: figures that JSON cannot hold become "nan", "inf" or "-inf"."""
    return json.dumps(_strict(view), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value


def _address(address: Address | None, slot: int | None = None) -> View | None:
    if address is None:
        return None
    return {
        "prompt": address.prompt,
        "position": address.position,
        "layer": address.layer,
        "site": str(address.site),
        "slot": slot,
        "text": str(address) if slot is None else f"{address} / slot {slot}",
    }


def _diagnosis(explained: Explained | None) -> View | None:
    if explained is None:
        return None
    return {
        **asdict(explained.diagnosis),
        "runners_up": [{"cause": c.cause, "explained": c.explained, "text": c.text} for c in explained.runners_up],
    }


def _mode(outcome: ModeOutcome) -> View:
    return {
        "status": outcome.status,
        "verdict": None if outcome.verdict is None else str(outcome.verdict),
        "kind": outcome.kind,
        "first_failure": _address(outcome.first_failure),
        "n_pairs": outcome.n_pairs,
        "n_exact": outcome.n_exact,
        "n_within": outcome.n_within,
        "n_beyond": outcome.n_beyond,
        "n_unpaired": outcome.n_unpaired,
        "reasons": list(outcome.reasons),
    }


def _evidence(item: Evidence) -> View:
    return asdict(item)


def _attention_stats(summary: Summary) -> View:
    """Minimum, maximum and mean over visible keys, by mode, site and pass; in all and by layer."""
    stats: View = {}
    for (mode, site, pass_name), by_layer in summary.attention.items():
        layers = {layer: _stat(item) for layer, item in by_layer.items()}
        total = layers.pop("all")
        stats.setdefault(mode, {}).setdefault(site, {})[pass_name] = {"layers": layers, "all": total}
    return stats


def _stat(item: RunningStats) -> View:
    if not item.n:
        return {"min": None, "max": None, "mean": None, "n": 0}
    return {"min": item.smallest, "max": item.largest, "mean": item.mean, "n": item.n}


def _alignment(figures: ModeFigures) -> View:
    """Whether the rows of K and V that decode reads are those that prefill wrote, by bits and within noise."""
    aligned = {how: figures.aligned(how) for how in ("bitwise", "within_noise")}
    return {**{name: asdict(item) for name, item in figures.alignment.items()}, "aligned": aligned}


def _not_run(run: Measured, names: Sequence[str]) -> str | None:
    """Which scenarios were not run, and the command that runs them."""
    if not names:
        return None
    return f"Not run: {', '.join(names)}. This says nothing about them; `{command_for_all(run.command)}` runs them"


def _hypotheses(run: Measured, decision: Decision, summary: Summary, what: str) -> View:
    """The evidence table: every row names its statistic, and its ticks are set by data."""
    rows = []
    by_name = {(item.instrument, item.mode): item for item in decision.evidence}
    for letter in ("k", "v"):
        fresh = by_name[f"freshness_{letter}", None]
        rows.append(_row(f"{letter.upper()} hashes vary across prompts", fresh.text, fresh.supports, not fresh.valid))
    for mode in run.modes:
        rows += _mode_rows(run, summary, mode, by_name)
    rows.append(_control_row(by_name[CONTROL_SEEN, None], decision.verdict))
    return {
        "h0": "the drift is structural: the two passes round differently, and the KV cache and attention are right",
        "h1": "the drift is a real mismatch: decode does not compute what prefill computes",
        "alpha": run.plan.alpha,
        "evidence": rows,
        "conclusion": _conclusion(run, decision, what),
    }


# What the evidence table calls what an instrument saw, in the order of its rows; %s: what judged sites have in common.
_ROWS = {
    "native": "Sites with %s differ beyond rounding at the native dtype",
    "new_rows": "A row that decode wrote itself is not that of prefill",
    "products": "A product with a weight of the model is off its float64 result",
    "replay": "Attention of decode is off its own float64 replay",
    "self_noise": "Drift beside what two prefills differ by, the self-noise",
    "cache": "A cached row stands out from those of its layer",
    "asymmetry": "One pass is further from float64 than the other",
    "directed": "A known cause is in decode's error",
}
# Instruments with rows of their own below.
_OWN_ROWS = {"ladder", "bits", "router", "choice"}


def _mode_rows(
    run: Measured, summary: Summary, mode: str, by_name: dict[tuple[str, str | None], Evidence]
) -> list[View]:
    figures = summary.modes[mode]
    rows = [
        _row(
            f"K and V of decode match prefill at the same layer ({mode})",
            f"largest excess over {figures.cache.n} cache reads: {figure(figures.cache.value)} (bound 1); bitwise: "
            f"{yes_no(figures.aligned('bitwise'))}",
            _side(figures.cache.value),
            measured=figures.cache.n > 0,
        ),
        _row(
            f"Attention outputs diverge beyond noise ({mode})",
            f"largest excess over {figures.outputs.n} attention outputs: {figure(figures.outputs.value)} (bound 1)",
            _side(figures.outputs.value),
            measured=figures.outputs.n > 0,
        ),
    ]
    ladder = by_name["ladder", mode]
    against = not ladder.valid and run.plan.ladder != "off"
    rows.append(_row(f"Drift scales with the unit roundoff ({mode})", ladder.text, ladder.supports, against))
    others = [name for name, at in by_name if at == mode and name not in _OWN_ROWS and name not in _ROWS]
    for name in (*_ROWS, *others):
        item = by_name.get((name, mode))
        if item is not None:
            title = _ROWS.get(name, item.statistic_name.capitalize()).replace("%s", summary.judged_inputs)
            rows.append(
                _row(f"{title} ({mode})", item.text if item.valid else f"abstains: {item.reason}", item.supports)
            )
    if (chosen := by_name.get((CHOICE, mode))) is not None:
        rows.append(_row(f"Choices of the generation loop ({mode})", chosen.text, chosen.supports, informs=True))
    bits = by_name["bits", mode]
    rows.append(_row(f"Same bits on two proven routes ({mode})", bits.text, bits.supports, not bits.valid))
    return rows


def _control_row(control: Evidence, verdict: Verdict) -> View:
    """The row of the positive control, which a mismatch does not need."""
    if verdict is Verdict.MISMATCH and not control.valid:
        return _row("Positive control seen", f"not needed: a mismatch was seen; {control.text}", None, measured=False)
    return _row("Positive control seen", control.text, None, not control.valid, informs=control.valid)


def _row(
    name: str,
    statistic: str,
    supports: str | None,
    against: bool = False,
    informs: bool = False,
    measured: bool = True,
) -> View:
    return {
        "evidence": name,
        "statistic": statistic,
        "supports_h0": supports == "H0",
        "supports_h1": supports == "H1",
        "against_the_run": against,
        "enables_a_verdict": informs,
        "measured": measured,
    }


def _side(excess: float | None) -> str | None:
    if excess is None:
        return None
    return "H0" if excess <= 1.0 else "H1"


def _conclusion(run: Measured, decision: Decision, what: str) -> str:
    partial = " Only one mode ran, so this is not a full conclusion." if len(run.modes) == 1 else ""
    guilty = guilty_prefill(run, decision)
    if decision.verdict is Verdict.MISMATCH:
        slot = "" if decision.first_slot is None else f", slot {decision.first_slot}"
        side = "" if guilty is None else f", and {guilty}"
        text = (
            f"H1: a real mismatch in {what}{side}. It begins at {decision.first_failure}{slot}, and rounding cannot "
            f"explain it.{_kind_text(decision)}"
        )
    elif decision.verdict is Verdict.INCONCLUSIVE:
        side = "" if guilty is None else f"; {guilty}"
        text = f"Neither H0 nor H1 in {what}{side}. Why: " + "; ".join(decision.reasons) + "."
    elif decision.verdict is Verdict.EXACT:
        text = f"H0: prefill and decode gave the same bits on two proven routes, in {what}."
    elif run.foreign is not None and not all(found.evidence.valid for found in decision.climbs.values()):
        text = (
            f"H0: the drift is structural as far as these files show it, in {what}. Every difference lies within what "
            "rounding may do at a site given its inputs, within replayed attention, or within the files' own "
            "self-noise."
        )
    elif run.plan.ladder == "off":
        text = (
            f"H0: the drift is structural, as far as the native dtype shows, in {what}. What could be judged there "
            "lies within what rounding can do; the precision ladder was switched off."
        )
    else:
        text = (
            f"H0: the drift is structural, in {what}. It shrinks with the unit roundoff at every address, as rounding "
            "does."
        )
    if decision.scope and decision.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT):
        text = f"Of this scope alone, {decision.scope}: {text}"
    return text + partial


def _kind_text(decision: Decision) -> str:
    """What kind of mismatch it is, in words."""
    if decision.kind == "precision":
        return " It is gone at higher precision, so it lies in arithmetic or storage that only the native dtype has."
    if decision.kind == "semantic":
        return f" It stays at {decision.rungs.upper}, so the two passes compute different functions."
    return ""


def _coverage(run: Measured, decision: Decision, coverage: Coverage) -> View:
    """Which sites were recorded, and which a plain decoder has and this model does not offer."""
    return {
        "sites_recorded": {str(site): n for site, n in coverage.n_layers_of_site.items()},
        "only_recorded": run.foreign is not None,
        "sites_not_offered": [str(site) for site in coverage.not_offered],
        "sites_in_some_layers_only": [str(site) for site in coverage.in_some_layers_only],
        "n_layers": run.info.n_layers,
        "n_layers_recorded": coverage.n_layers_wanted,
        "chains": _chains(decision),
        "prompts": [
            {"id": p.name, "n_tokens": len(p.prompt), "span": len(p.continuation), "continuation": list(p.continuation)}
            for p in run.prompts
        ],
        "n_pairs": {outcome.mode: outcome.n_pairs for outcome in decision.outcomes},
        "n_unpaired": coverage.n_unpaired,
        "rungs": list(coverage.rungs),
        "rungs_failed": dict(run.rung_failures),
        "routes": [
            {
                "mode": route.mode,
                "rung": route.rung,
                "prompt": route.prompt,
                "proof": route.is_proof,
                "problems": list(route.problems),
                "prefill": [_call(call) for call in route.prefill],
                "decode": [_call(call) for call in route.decode],
            }
            for route in coverage.routes
        ],
    }


def _chains(decision: Decision) -> list[View]:
    """The chain of every mode; modes with the same are told together."""
    by_mode = {mode: _chain(chain) for mode, chain in decision.chains.items()}
    different = [chain for i, chain in enumerate(by_mode.values()) if chain not in list(by_mode.values())[:i]]
    return [{"modes": [mode for mode, own in by_mode.items() if own == chain], **chain} for chain in different]


def _chain(chain: Chain) -> View:
    """The chain from the cache to the logits: "yes" if a site was compared at every probed position, "no" if not, and
    "absent" if the model does not have it."""
    words = {True: "yes", False: "no", None: "absent"}
    alike = [
        (sites, [layer for layer, _ in group])
        for sites, group in groupby(chain.layers.items(), key=lambda item: tuple(item[1].items()))
    ]
    return {
        "layers": [
            {"first": layers[0], "last": layers[-1], "sites": {str(site): words[state] for site, state in sites}}
            for sites, layers in alike
        ],
        "outside": {str(site): words[state] for site, state in chain.outside.items()},
        "whole": chain.is_whole,
        "holds_up_to": None if chain.last is None else str(chain.last),
        "missing": None if chain.missing is None else str(chain.missing),
    }


def _call(call: Call) -> View:
    """What is known of a call; `overflow` stands only where something ran out of range."""
    return {name: value for name, value in msgspec.structs.asdict(call).items() if (name, value) != ("overflow", None)}


def _environment(run: Measured) -> View:
    info = run.info
    return {
        "engine": info.engine,
        "model": info.model,
        "model_hash": info.model_hash,
        "dtype": info.dtype,
        "device": info.device,
        "attention": info.attention,
        "cache": info.cache,
        "parameters": info.parameters,
        "versions": dict(info.versions),
        "notes": list(info.notes),
        "plan": {
            "mode": run.plan.mode,
            "ladder": run.plan.ladder,
            "span": run.plan.span,
            "layers": None if run.plan.layers is None else list(run.plan.layers),
            "alpha": run.plan.alpha,
            "seed": run.plan.seed,
            "lengths": None if run.plan.lengths is None else list(run.plan.lengths),
        },
        "command": run.command,
    }


def figure(value: float | None) -> str:
    """Return a figure for people: three significant digits, words for what is not a number."""
    if value is None:
        return "not measured"
    if math.isnan(value):
        return "NaN"
    if math.isinf(value):
        return "infinite" if value > 0 else "-infinite"
    if value == 0:
        return "0"
    return f"{value:.3g}" if 1e-3 <= abs(value) < 1e5 else f"{value:.2e}"


def yes_no(value: bool | None) -> str:
    """Return True, False or "not measured"."""
    return "not measured" if value is None else str(value)
