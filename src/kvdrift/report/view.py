"""A judged run as plain data: exactly what report.json holds, and the only thing that other renderings read."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from dataclasses import asdict
from typing import Any

import msgspec
import numpy as np

from kvdrift.diagnosis.diagnose import Explained
from kvdrift.instruments.choice import INSTRUMENT
from kvdrift.instruments.native import inputs_of
from kvdrift.measure.attention import RunningStats
from kvdrift.measure.measured import Measured
from kvdrift.report.lengths import build_lengths_view
from kvdrift.report.recommend import recommend
from kvdrift.verdict.decide import Decision
from kvdrift.verdict.judge import Judged
from kvdrift.vocabulary.address import Address, Place
from kvdrift.vocabulary.evidence import Evidence, ModeOutcome, Verdict
from kvdrift.vocabulary.sites import EXPECTED_SITES, FORWARD_ORDER, Site

SCHEMA_VERSION = 1
# History of the report's schema:
#   1  first version

View = dict[str, Any]
_PROJECTIONS = (Site.Q_PROJ, Site.K_PROJ, Site.V_PROJ)


def build_view(judged: Judged) -> View:
    """Return the report of a route as plain data."""
    run, decision, explained = judged.measured, judged.decision, judged.explained
    return {
        "schema_version": SCHEMA_VERSION,
        "created": run.created,
        "model": run.info.model,
        "verdict": str(decision.verdict),
        "kind": decision.kind,
        "exit_code": decision.verdict.exit_code,
        "first_failure": _address(decision.first_failure, decision.first_slot),
        "diagnosis": _diagnosis(explained),
        "reasons": list(decision.reasons),
        "lengths": build_lengths_view(judged),
        "modes": {outcome.mode: _mode(outcome) for outcome in sorted(decision.outcomes, key=lambda o: o.mode)},
        "projection_hashes": _projection_hashes(run, decision),
        "attention_stats": _attention_stats(run),
        "kv_alignment": {str(mode): _alignment(run, decision, str(mode)) for mode in run.modes},
        "hypotheses": _hypotheses(run, decision),
        "recommendations": recommend(decision, judged.diagnosis),
        "instruments": [_evidence(item) for item in decision.evidence],
        "coverage": _coverage(run, decision),
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


def _projection_hashes(run: Measured, decision: Decision) -> list[View]:
    """One entry for each projection, layer, prompt and mode; the hash is of prefill at the first probed position."""
    entries: list[View] = []
    for mode in run.modes:
        rows = run.table.select(mode, run.info.dtype)
        values, is_known = decision.climbs[mode].excess.of(rows)
        at = np.flatnonzero(rows.is_at(*_PROJECTIONS))
        group = rows.place[at] * len(rows.names) + rows.prompt[at]
        by_group = np.lexsort((rows.position[at], group))
        for here in np.split(at[by_group], np.flatnonzero(np.diff(group[by_group])) + 1) if len(at) else ():
            first = rows.row(int(here[0]))
            entries.append(
                {
                    "mode": str(mode),
                    "tensor": str(first.site),
                    "layer": first.layer,
                    "prompt": first.prompt,
                    "position": first.position,
                    "sha256_prefill": first.sha256_prefill,
                    "sha256_decode": first.sha256_decode,
                    "n_positions": len(here),
                    "n_exact": int(rows.equal[here].sum()),
                    "max_ulp": float(rows.max_ulp[here].max()),
                    "max_rel_l2": float(rows.rel_l2[here].max()),
                    "excess": float(values[here].max()) if is_known[here].all() else None,
                }
            )
    order = {prompt.name: index for index, prompt in enumerate(run.prompts)}
    entries.sort(key=lambda e: (e["mode"], Place(e["layer"], Site(e["tensor"])).forward_rank, order[e["prompt"]]))
    return entries


def _attention_stats(run: Measured) -> View:
    """Minimum, maximum and mean over visible keys, by mode, site and pass; in all and by layer."""
    stats: View = {}
    for (mode, pass_name, site, layer), item in sorted(run.attention.by_place.items()):
        place = stats.setdefault(mode, {}).setdefault(site, {}).setdefault(pass_name, {"layers": {}})
        place["layers"][str(layer)] = _stat(item)
    for mode, sites in stats.items():
        for site, passes in sites.items():
            for pass_name, place in passes.items():
                total = RunningStats()
                for key, item in run.attention.by_place.items():
                    if key[:3] == (mode, pass_name, site):
                        total.merge(item)
                place["all"] = _stat(total)
    return stats


def _stat(item: RunningStats) -> View:
    if not item.n:
        return {"min": None, "max": None, "mean": None, "n": 0}
    return {"min": item.smallest, "max": item.largest, "mean": item.mean, "n": item.n}


def _alignment(run: Measured, decision: Decision, mode: str) -> View:
    """Whether the rows of K and V that decode reads are those that prefill wrote, by bits and within noise."""
    excess = decision.climbs[mode].excess
    native = run.table.select(mode, run.info.dtype)
    result: View = {}
    for name, site in (("k", Site.K_CACHE), ("v", Site.V_CACHE)):
        rows = native.where(native.is_at(site))
        values, is_known = excess.of(rows)
        judged = values[is_known]
        result[name] = {
            "n_reads": len(rows),
            "bitwise": bool(rows.equal.all()) if len(rows) else None,
            "within_noise": bool((judged <= 1.0).all()) if 0 < len(judged) == len(rows) else None,
            "n_exact": int(rows.equal.sum()),
            "n_bad_slots": int(rows.n_bad_slots.sum()),
            "n_lost_slots": int(rows.n_lost.sum()),
            "max_excess": float(judged.max()) if len(judged) else None,
        }
    for key in ("bitwise", "within_noise"):
        both = [result["k"][key], result["v"][key]]
        result.setdefault("aligned", {})[key] = None if None in both else all(both)
    return result


def _hypotheses(run: Measured, decision: Decision) -> View:
    """The evidence table: every row names its statistic, and its ticks are set by data."""
    rows = []
    by_name = {(item.instrument, item.mode): item for item in decision.evidence}
    for letter in ("k", "v"):
        fresh = by_name[f"freshness_{letter}", None]
        rows.append(_row(f"{letter.upper()} hashes vary across prompts", fresh.text, fresh.supports, not fresh.valid))
    for mode in run.modes:
        rows += _mode_rows(run, decision, str(mode), by_name)
    control = by_name["positive_control", None]
    rows.append(_row("Positive control seen", control.text, None, not control.valid, informs=control.valid))
    return {
        "h0": "the drift is structural: the two passes round differently, and the KV cache and attention are right",
        "h1": "the drift is a real mismatch: decode does not compute what prefill computes",
        "alpha": run.plan.alpha,
        "evidence": rows,
        "conclusion": _conclusion(run, decision),
    }


def _mode_rows(
    run: Measured, decision: Decision, mode: str, by_name: dict[tuple[str, str | None], Evidence]
) -> list[View]:
    found = decision.climbs[mode]
    alignment = _alignment(run, decision, mode)["aligned"]
    rows = []
    cache = found.excess.where(found.excess.rows.is_at(Site.K_CACHE, Site.V_CACHE))
    rows.append(
        _row(
            f"K and V of decode match prefill at the same layer ({mode})",
            f"largest excess over {len(cache)} cache reads: {figure(cache.largest)} (bound 1); bitwise: "
            f"{yes_no(alignment['bitwise'])}",
            _side(cache.largest),
            measured=len(cache) > 0,
        )
    )
    outputs = found.excess.where(found.excess.rows.is_at(Site.ATTN_CTX, Site.ATTN_OUT))
    rows.append(
        _row(
            f"Attention outputs diverge beyond noise ({mode})",
            f"largest excess over {len(outputs)} attention outputs: {figure(outputs.largest)} (bound 1)",
            _side(outputs.largest),
            measured=len(outputs) > 0,
        )
    )
    ladder = by_name["ladder", mode]
    against = not ladder.valid and run.plan.ladder != "off"
    rows.append(_row(f"Drift scales with the unit roundoff ({mode})", ladder.text, ladder.supports, against))
    names = {
        "native": f"Sites with {inputs_of(run.info.arithmetic)} differ beyond rounding at the native dtype ({mode})",
        "replay": f"Attention of decode is off its own float64 replay ({mode})",
        "self_noise": f"Drift beside what two prefills differ by, the self-noise ({mode})",
        "cache": f"A cached row stands out from those of its layer ({mode})",
        "asymmetry": f"One pass is further from float64 than the other ({mode})",
        "directed": f"A known cause is in decode's error ({mode})",
    }
    for instrument, name in names.items():
        item = by_name.get((instrument, mode))
        if item is not None:
            rows.append(_row(name, item.text if item.valid else f"abstains: {item.reason}", item.supports))
    if (chosen := by_name.get((INSTRUMENT, mode))) is not None:
        rows.append(_row(f"Choices of the generation loop ({mode})", chosen.text, chosen.supports, informs=True))
    bits = by_name["bits", mode]
    rows.append(_row(f"Same bits on two proven routes ({mode})", bits.text, bits.supports, not bits.valid))
    return rows


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


def _conclusion(run: Measured, decision: Decision) -> str:
    partial = " Only one mode ran, so this is not a full conclusion." if len(run.modes) == 1 else ""
    if decision.verdict is Verdict.MISMATCH:
        slot = "" if decision.first_slot is None else f", slot {decision.first_slot}"
        where = f"{decision.first_failure}{slot}"
        text = f"H1: a real mismatch. It begins at {where}, and rounding cannot explain it.{_kind_text(decision)}"
    elif decision.verdict is Verdict.INCONCLUSIVE:
        text = "Neither H0 nor H1: " + "; ".join(decision.reasons) + "."
    elif decision.verdict is Verdict.EXACT:
        text = "H0: prefill and decode gave the same bits on two proven routes."
    elif run.foreign is not None and not all(found.evidence.valid for found in decision.climbs.values()):
        text = (
            "H0: the drift is structural as far as these files show it: every difference lies within what rounding "
            "may do at a site given its inputs, within replayed attention, or within the files' own self-noise."
        )
    elif run.plan.ladder == "off":
        text = (
            "H0: the drift is structural, as far as the native dtype shows. What could be judged there lies within "
            "what rounding can do; the precision ladder was switched off."
        )
    else:
        text = "H0: the drift is structural. It shrinks with the unit roundoff at every address, as rounding does."
    return text + partial


def _kind_text(decision: Decision) -> str:
    """What kind of mismatch it is, in words."""
    if decision.kind == "precision":
        return " It is gone at higher precision, so it lies in arithmetic or storage that only the native dtype has."
    if decision.kind == "semantic":
        return f" It stays at {decision.rungs.upper}, so the two passes compute different functions."
    return ""


def _coverage(run: Measured, decision: Decision) -> View:
    """Which sites were recorded, and which a plain decoder has and this model does not offer."""
    recorded: dict[str, list[int | None]] = defaultdict(list)
    for layer, sites in run.seen_sites.items():
        for site in sites:
            recorded[str(site)].append(layer)
    wanted = run.info.n_layers if run.plan.layers is None else len(run.plan.layers)
    missing = [str(site) for site in EXPECTED_SITES if str(site) not in recorded]
    partial = [site for site, found in recorded.items() if None not in found and len(found) < wanted]
    return {
        "sites_recorded": {
            site: len(recorded[site]) for site in sorted(recorded, key=lambda s: FORWARD_ORDER[Site(s)])
        },
        "sites_not_offered": missing,
        "sites_in_some_layers_only": sorted(partial, key=lambda s: FORWARD_ORDER[Site(s)]),
        "n_layers": run.info.n_layers,
        "n_layers_recorded": wanted,
        "prompts": [
            {"id": p.name, "n_tokens": len(p.prompt), "span": len(p.continuation), "continuation": list(p.continuation)}
            for p in run.prompts
        ],
        "n_pairs": {outcome.mode: outcome.n_pairs for outcome in decision.outcomes},
        "n_unpaired": len(run.table.unpaired),
        "rungs": sorted(run.table.rungs),
        "rungs_failed": dict(run.rung_failures),
        "routes": [
            {
                "mode": route.mode,
                "rung": route.rung,
                "prompt": route.prompt,
                "proof": route.is_proof,
                "problems": list(route.problems),
                "prefill": [msgspec.structs.asdict(call) for call in route.prefill],
                "decode": [msgspec.structs.asdict(call) for call in route.decode],
            }
            for route in run.routes
        ],
    }


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
    """Return a figure for people: three significant digits, words for what is no number."""
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
