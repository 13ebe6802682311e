"""Try every explanation that fits the first failing site, and keep the one that removes the difference."""

from __future__ import annotations

from dataclasses import dataclass

from kvdrift.diagnosis.model import Candidate, Suspect
from kvdrift.diagnosis.plain import explain_plainly
from kvdrift.diagnosis.rotation import explain_rotation
from kvdrift.diagnosis.scores import explain_attention
from kvdrift.diagnosis.slots import explain_slots
from kvdrift.verdict.model import Diagnosis

# At a high rung nothing but the fault is left, so the true cause explains nearly all; at the native dtype rounding is
# in the way, and an explanation must beat it clearly.
_ENOUGH = {"float64": 0.999, "float32": 0.99}
_ENOUGH_NATIVE = 0.8
_RUNNERS_UP = 3


@dataclass(frozen=True, slots=True)
class Explained:
    """The winner, and what came after it."""

    diagnosis: Diagnosis
    runners_up: tuple[Candidate, ...]


def diagnose(suspect: Suspect) -> Explained:
    """Return the best explanation of a mismatch; "unexplained" if none removes enough of it.

    The share that an explanation must remove depends on the rung of the captured values. Ties go to the one that was
    written for the site over the general one.
    """
    special = [*explain_slots(suspect), *explain_rotation(suspect), *explain_attention(suspect)]
    general = [*explain_plainly(suspect)]
    best: dict[str, Candidate] = {}
    for rank, candidates in enumerate((general, special)):
        for item in candidates:
            # A special explanation wins over a general one that explains as much.
            weighted = Candidate(item.explained + 1e-7 * rank, item.cause, item.text)
            if item.cause not in best or best[item.cause] < weighted:
                best[item.cause] = weighted
    ranked = sorted(best.values(), reverse=True)
    enough = _ENOUGH.get(suspect.rung, _ENOUGH_NATIVE)
    runners_up = tuple(item for item in ranked[1 : 1 + _RUNNERS_UP] if item.explained > 0.0)
    if not ranked or ranked[0].explained < enough:
        nearest = f"; the nearest, {ranked[0].cause}, explains {ranked[0].explained:.1%}" if ranked else ""
        text = f"no cause of the catalogue explains the difference at {suspect.address}{nearest}"
        return Explained(Diagnosis("unexplained", 0.0, text), tuple(ranked[:_RUNNERS_UP]))
    winner = ranked[0]
    return Explained(Diagnosis(winner.cause, min(1.0, winner.explained), winner.text), runners_up)
