"""Try every explanation that fits the first failing site, and keep the one that removes the difference."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvdrift.diagnosis.inside import explain_attention
from kvdrift.diagnosis.model import ENOUGH, GENERAL, LEAST_ENOUGH, Candidate, Suspect, rounding_share
from kvdrift.diagnosis.norms import explain_norm
from kvdrift.diagnosis.operands import both_rows
from kvdrift.diagnosis.parts import explain_parts
from kvdrift.diagnosis.plain import explain_plainly
from kvdrift.diagnosis.rotation import explain_rotation
from kvdrift.diagnosis.shape import shape_of
from kvdrift.diagnosis.slots import explain_slots, shared_rows
from kvdrift.diagnosis.sums import explain_sums
from kvdrift.diagnosis.written import explain_written_row
from kvdrift.vocabulary.address import Address
from kvdrift.vocabulary.causes import Cause
from kvdrift.vocabulary.evidence import Diagnosis
from kvdrift.vocabulary.shapes import Pass
from kvdrift.vocabulary.sites import ATTENTION_ROW_SITES, CACHE_SITES

# What rounding leaves over is allowed for so many times, up to `LEAST_ENOUGH`: where nearly all of a difference may be
# rounding, no explanation of the rest can be told from another.
_ROOM_FOR_ROUNDING = 4.0
# Explanations that differ by less than this explain a difference equally well, where rounding adds nothing.
_ALIKE = 1e-5
_RUNNERS_UP = 3
_EXCHANGED = {"decode": "prefill", "prefill": "decode"}
_PASSES = re.compile(r"\b(decode|prefill)\b")


@dataclass(frozen=True, slots=True)
class Explained:
    """The winner, and what came after it; `address` is the one on whose values it was tried, None for no values."""

    diagnosis: Diagnosis
    runners_up: tuple[Candidate, ...]
    address: Address | None = None


def diagnose(suspect: Suspect, guilty: Pass | None = None) -> Explained:
    """Return the best explanation of a mismatch; UNEXPLAINED, with the shape of the error, if none removes enough of
    it. `guilty` is the pass that other evidence found to be off.

    Explanations that remove as much, up to rounding, cannot be told apart by this data: the one that leaves the least
    to be fitted is named, and the text says which others explain it as well.
    """
    noise = _noise(suspect)
    candidates = list(_candidates(suspect))
    ranked = sorted(_best_of_causes(candidates, lambda c: c.explained), reverse=True)
    enough = max(LEAST_ENOUGH, ENOUGH - _ROOM_FOR_ROUNDING * noise)
    if guilty != "decode" and (not ranked or ranked[0].explained < enough):
        of_prefill = [item for item in _of_prefill(suspect) if item.explained >= enough]
        if of_prefill:
            candidates = of_prefill
            ranked = sorted(_best_of_causes(candidates, lambda c: c.explained), reverse=True)
    if not ranked or ranked[0].explained < enough:
        nearest = f"; the nearest, {ranked[0].cause}, explains {ranked[0].explained:.1%}" if ranked else ""
        text = f"no cause of the catalogue explains the difference at {suspect.address}{nearest}"
        shape = shape_of(suspect, guilty)
        slots = () if shape is None else shape.slots
        return Explained(
            Diagnosis(Cause.UNEXPLAINED, 0.0, text, slots, shape), tuple(ranked[:_RUNNERS_UP]), suspect.address
        )
    alike = max(enough, ranked[0].explained - max(_ALIKE, noise))
    # Of one cause too that form counts which leaves the least to be fitted, if it explains as much.
    equals = sorted(
        _best_of_causes((c for c in candidates if c.explained >= alike), _by_rank), key=_by_rank, reverse=True
    )
    winner = equals[0]
    runners_up = [*equals[1:], *(item for item in ranked if 0.0 < item.explained < alike)]
    as_well = [item.cause for item in equals[1:] if item.rank == winner.rank]
    text = winner.text + (f" (explained as well by {', '.join(as_well)})" if as_well else "")
    diagnosis = Diagnosis(winner.cause, min(1.0, winner.explained), text, winner.slots)
    return Explained(diagnosis, tuple(runners_up[:_RUNNERS_UP]), suspect.address)


def _of_prefill(suspect: Suspect) -> Iterator[Candidate]:
    """What may have happened to prefill, if decode is right: the same causes with the passes exchanged."""
    for item in _candidates(replace(suspect, prefill=suspect.decode, decode=suspect.prefill)):
        if item.cause != Cause.NOT_CAUSAL and item.rank != GENERAL:
            yield replace(item, text=_PASSES.sub(lambda found: _EXCHANGED[found[0]], item.text))


def _by_rank(candidate: Candidate) -> tuple[int, float]:
    return candidate.rank, candidate.explained


def _best_of_causes(candidates: Iterable[Candidate], key: Callable[[Candidate], Any]) -> list[Candidate]:
    """Return the best candidate of each cause."""
    best: dict[Cause, Candidate] = {}
    for item in candidates:
        if item.cause not in best or key(best[item.cause]) < key(item):
            best[item.cause] = item
    return list(best.values())


def _candidates(suspect: Suspect) -> Iterator[Candidate]:
    for explain in (
        explain_slots,
        explain_written_row,
        explain_rotation,
        explain_norm,
        explain_attention,
        explain_sums,
        explain_parts,
        explain_plainly,
    ):
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
