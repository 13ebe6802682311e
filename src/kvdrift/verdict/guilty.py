"""Which of the two passes is at fault, where that is known: a prefill that is wrong must not pass for the reference."""

from __future__ import annotations

from kvdrift.measure.measured import Measured
from kvdrift.verdict.caveats import unstable_prefill
from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.evidence import Verdict


def guilty_prefill(measured: Measured, decision: Decision) -> str | None:
    """Return why prefill is the side that is wrong, as a clause; None if it is not known to be.

    It is if it depends on the tokens behind a token, or if an instrument that knows each pass's error says so.
    """
    if unstable_prefill(measured) is not None:
        return "prefill is not a reference here: its values depend on later tokens"
    if decision.verdict is not Verdict.MISMATCH:
        return None
    sides = [item for item in decision.evidence if item.valid and item.detail.get("guilty") in ("prefill", "decode")]
    wrong = [item for item in sides if item.detail["guilty"] == "prefill"]
    if not wrong or len(wrong) < len(sides):
        return None
    names = " and ".join(dict.fromkeys(item.instrument for item in wrong))
    return f"prefill is the side that is off, by {names}; decode agrees with what both should compute"
