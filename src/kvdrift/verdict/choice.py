"""What wrong choices of a generation loop mean for a verdict."""

from __future__ import annotations

from dataclasses import replace

from kvdrift.instruments.choice import ChoiceTable, judge_choices
from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.evidence import Verdict


def weigh_choices(decision: Decision, table: ChoiceTable, mode: str) -> Decision:
    """Return the decision with what was seen of the choices made in `mode`, if there were any.

    Near ties inform. A wrong choice is a MISMATCH, see `kvdrift.instruments.choice`: it begins at the logits that do
    not call for it, and has no kind, since no drift is there that could shrink. Where a tensor drifts beyond noise,
    that comes first.
    """
    seen = judge_choices(table, mode, is_rounding=decision.verdict in (Verdict.EXACT, Verdict.STRUCTURAL_DRIFT))
    if seen is None:
        return decision
    decision = replace(decision, evidence=(*decision.evidence, seen))
    wrong = [item for item in table.all_turned() if item.is_wrong]
    if not wrong or decision.verdict is Verdict.MISMATCH:
        return decision
    first = wrong[0]
    outcomes = tuple(
        replace(
            outcome,
            status="FAIL",
            verdict=Verdict.MISMATCH,
            kind=None,
            first_failure=first.address,
            reasons=(first.text,),
        )
        if outcome.mode == mode
        else outcome
        for outcome in decision.outcomes
    )
    return replace(
        decision,
        verdict=Verdict.MISMATCH,
        kind=None,
        first_failure=first.address,
        first_slot=None,
        outcomes=outcomes,
        reasons=(first.text,),
    )
