"""Try every explanation that fits the first failing site, and keep the one that removes the difference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kvdrift.diagnosis.inside import explain_attention
from kvdrift.diagnosis.model import Candidate, Suspect, rounding_share
from kvdrift.diagnosis.norms import explain_norm
from kvdrift.diagnosis.operands import both_rows
from kvdrift.diagnosis.plain import explain_plainly
from kvdrift.diagnosis.rotation import explain_rotation
from kvdrift.diagnosis.slots import explain_slots, shared_rows
from kvdrift.sites import ATTENTION_ROW_SITES, CACHE_SITES
from kvdrift.verdict.model import Diagnosis

# The share that an explanation must remove. What rounding leaves over is allowed for, up to the second figure: where
# nearly all of a difference may be rounding, no explanation of the rest can be told from another.
_ENOUGH, _ENOUGH_IN_NOISE = 0.999, 0.8
_ROOM_FOR_ROUNDING = 4.0
# Explanations that differ by less than this explain a difference equally well, where rounding adds nothing.
_ALIKE = 1e-5
_RUNNERS_UP = 3
# What a diagnosis says where no cause of the catalogue explains enough.
UNEXPLAINED = "unexplained"


@dataclass(frozen=True, slots=True)
class Explained:
    """The winner, and what came after it."""

    diagnosis: Diagnosis
    runners_up: tuple[Candidate, ...]


def diagnose(suspect: Suspect) -> Explained:
    """Return the best explanation of a mismatch; "unexplained" if none removes enough of it.

    Explanations that remove as much, up to rounding, cannot be told apart by this data: the one that leaves the least
    to be fitted is named, and the text says which others explain it as well.
    """
    noise = _noise(suspect)
    best: dict[str, Candidate] = {}
    for item in _candidates(suspect):
        known = best.get(item.cause)
        if known is None or known < item:
            best[item.cause] = item
    ranked = sorted(best.values(), reverse=True)
    enough = max(_ENOUGH_IN_NOISE, _ENOUGH - _ROOM_FOR_ROUNDING * noise)
    if not ranked or ranked[0].explained < enough:
        nearest = f"; the nearest, {ranked[0].cause}, explains {ranked[0].explained:.1%}" if ranked else ""
        text = f"no cause of the catalogue explains the difference at {suspect.address}{nearest}"
        return Explained(Diagnosis(UNEXPLAINED, 0.0, text), tuple(ranked[:_RUNNERS_UP]))
    alike = max(enough, ranked[0].explained - max(_ALIKE, noise))
    equals = sorted((c for c in ranked if c.explained >= alike), key=lambda c: (c.rank, c.explained), reverse=True)
    winner = equals[0]
    runners_up = [*equals[1:], *(item for item in ranked if 0.0 < item.explained < alike)]
    as_well = [item.cause for item in equals[1:] if item.rank == winner.rank]
    text = winner.text + (f" (explained as well by {', '.join(as_well)})" if as_well else "")
    return Explained(Diagnosis(winner.cause, min(1.0, winner.explained), text), tuple(runners_up[:_RUNNERS_UP]))


def _candidates(suspect: Suspect) -> Iterator[Candidate]:
    for explain in (explain_slots, explain_rotation, explain_norm, explain_attention, explain_plainly):
        yield from explain(suspect)


def _noise(suspect: Suspect) -> float:
    """The share of the difference at the first failing address that rounding may make."""
    site, position = suspect.address.site, suspect.address.position
    if site in CACHE_SITES:
        rows = shared_rows(suspect)
        return 0.0 if rows is None else rounding_share(suspect.unit, rows.prefill[rows.bad], rows.decode[rows.bad])
    prefill, decode = suspect.prefill.at(site, position), suspect.decode.at(site, position)
    if prefill is None or decode is None:
        return 0.0
    if site in ATTENTION_ROW_SITES:
        both = both_rows(suspect, site)
        if both is None:
            return 0.0
        seen = np.isfinite(both[0]) & np.isfinite(both[1])
        return rounding_share(suspect.unit, both[0][seen], both[1][seen])
    return rounding_share(suspect.unit, prefill, decode) if prefill.shape == decode.shape else 0.0
