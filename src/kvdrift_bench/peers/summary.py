"""How every peer's rule does on the same runs: at its own threshold, at the best one, and over all of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec
import numpy as np

from kvdrift_bench.peers.rules import RULES
from kvdrift_bench.run.records import PeerRecord, Place, Record

SHARES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)  # of false alarms, at which the share of found faults is tabled

Points = list[tuple[float, float]]


class PeerFigures(msgspec.Struct, kw_only=True):
    """One rule on one model at one dtype, so that a threshold is tuned to each of them.

    Attributes:
        faults, clean, twins: runs that the rule could be applied to.
        found, placed, clean_alarms, twin_alarms: flagged at the peer's own threshold; of the faults found, those whose
            first flagged tensor is the true one or the one right after.
        best_threshold: the threshold that no clean run crosses and the most faults do, chosen on these very runs; for
            rules that flag from below, it is turned around. None if no threshold spares the clean runs, or if any
            difference is above the best.
        best_found, best_placed, best_twin_alarms: the same at that threshold.
        quiet_found, quiet_placed: the same at the threshold that no clean run and no twin crosses.
        auc: the chance that a fault raises a larger alarm than a clean run, ties counting half; None without runs.
        roc: (share of clean runs flagged, share of faults flagged) at every threshold that changes either.
        roc_harmless: the same with the twins among the clean runs.
        found_at: share of faults flagged where at most this share of the clean runs is.
    """

    rule: str
    model: str
    dtype: str
    faults: int
    clean: int
    twins: int
    found: int
    placed: int
    clean_alarms: int
    twin_alarms: int
    best_threshold: float | None
    best_found: int
    best_placed: int
    best_twin_alarms: int
    quiet_found: int
    quiet_placed: int
    auc: float | None
    roc: Points
    roc_harmless: Points
    found_at: dict[str, float | None]


def compare_peers(faults: Sequence[Record], harmless: Sequence[Record]) -> list[PeerFigures]:
    """Return the figures of every rule that was applied, by model and dtype, in the order of the rules."""
    groups = sorted({(record.model, record.dtype) for record in (*faults, *harmless)})
    result = []
    for group in groups:
        for rule in RULES:
            of_faults = _applied(rule.name, group, faults)
            of_clean = _applied(rule.name, group, [record for record in harmless if record.kind == "clean"])
            of_twins = _applied(rule.name, group, [record for record in harmless if record.kind == "twin"])
            if of_faults or of_clean or of_twins:
                result.append(_figures(rule.name, group, of_faults, of_clean, of_twins))
    return result


def first_beyond(peer: PeerRecord, threshold: float) -> Place | None:
    """Return the first place whose alarm is above `threshold`, None if none is."""
    for step in peer.steps or ():
        if step.alarm is None or step.alarm > threshold:
            return (step.layer, step.site)
    return None


def highest_alarm(peer: PeerRecord) -> float:
    """Return the largest alarm of a run."""
    if not peer.steps:
        return -math.inf
    alarm = peer.steps[-1].alarm
    return math.inf if alarm is None else alarm


def area_under_curve(clean: Sequence[float], faults: Sequence[float]) -> float | None:
    """Return the chance that a fault's alarm is above a clean one's, ties counting half; None if a side is empty."""
    if not clean or not faults:
        return None
    below = np.asarray(clean, dtype=np.float64)
    wins = sum(float((below < alarm).sum()) + 0.5 * float((below == alarm).sum()) for alarm in faults)
    return wins / (len(clean) * len(faults))


def roc_points(clean: Sequence[float], faults: Sequence[float]) -> Points:
    """Return (share of clean runs, share of faults) above each threshold that parts them, from the highest down."""
    if not clean or not faults:
        return []
    below, above = np.asarray(clean, dtype=np.float64), np.asarray(faults, dtype=np.float64)
    points = [(0.0, 0.0)]
    for threshold in sorted({*clean, *faults}, reverse=True):
        points.append((float((below >= threshold).mean()), float((above >= threshold).mean())))
    return list(dict.fromkeys(points))


def found_where(points: Points, share: float) -> float | None:
    """Return the largest share of faults flagged where at most `share` of the harmless runs is, None without a curve.

    Nothing is interpolated: between two points no threshold lies.
    """
    return max((found for alarms, found in points if alarms <= share), default=None)


def pooled_curve(curves: Sequence[tuple[Points, int]]) -> Points:
    """Return the mean of several curves, each with its weight, at equal shares of false alarms.

    Each keeps a threshold of its own, so that a rule is tuned to every model (vertical averaging; Fawcett, An
    introduction to ROC analysis, 2006).
    """
    known = [(points, weight) for points, weight in curves if points and weight]
    total = sum(weight for _, weight in known)
    shares = sorted({alarms for points, _ in known for alarms, _ in points})
    return [
        (share, sum((found_where(points, share) or 0.0) * weight for points, weight in known) / total)
        for share in shares
    ]


def _applied(rule: str, group: tuple[str, str], records: Sequence[Record]) -> list[tuple[Record, PeerRecord]]:
    return [
        (record, record.peers[rule])
        for record in records
        if (record.model, record.dtype) == group and rule in record.peers and record.peers[rule].steps is not None
    ]


def _figures(
    rule: str,
    group: tuple[str, str],
    faults: Sequence[tuple[Record, PeerRecord]],
    clean: Sequence[tuple[Record, PeerRecord]],
    twins: Sequence[tuple[Record, PeerRecord]],
) -> PeerFigures:
    clean_alarms = [highest_alarm(peer) for _, peer in clean]
    twin_alarms = [highest_alarm(peer) for _, peer in twins]
    fault_alarms = [highest_alarm(peer) for _, peer in faults]
    # Just above every clean run; where there is none, no threshold is known to be quiet.
    best = max(clean_alarms, default=math.inf)
    at_best = [(record, first_beyond(peer, best)) for record, peer in faults if best < math.inf]
    quiet = max([best, *twin_alarms])
    at_quiet = [(record, first_beyond(peer, quiet)) for record, peer in faults if quiet < math.inf]
    points = roc_points(clean_alarms, fault_alarms)
    return PeerFigures(
        rule=rule,
        model=group[0],
        dtype=group[1],
        faults=len(faults),
        clean=len(clean),
        twins=len(twins),
        found=sum(peer.flagged for _, peer in faults),
        placed=sum(peer.flagged and peer.first in record.places for record, peer in faults),
        clean_alarms=sum(peer.flagged for _, peer in clean),
        twin_alarms=sum(peer.flagged for _, peer in twins),
        best_threshold=best if math.isfinite(best) else None,
        best_found=sum(place is not None for _, place in at_best),
        best_placed=sum(place in record.places for record, place in at_best),
        best_twin_alarms=sum(alarm > best for alarm in twin_alarms),
        quiet_found=sum(place is not None for _, place in at_quiet),
        quiet_placed=sum(place in record.places for record, place in at_quiet),
        auc=area_under_curve(clean_alarms, fault_alarms),
        roc=points,
        roc_harmless=roc_points([*clean_alarms, *twin_alarms], fault_alarms),
        found_at={f"{share:g}": found_where(points, share) for share in SHARES},
    )
