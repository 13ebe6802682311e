"""The scenario table: every scenario's verdict, first failure, worst excess and diagnosis, or why it did not apply."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec

from kvdrift.report.about import about
from kvdrift.report.view import build_view
from kvdrift.verdict.suite import JudgedSuite, Outcome, Suite
from kvdrift.vocabulary.evidence import CHOICE
from kvdrift.vocabulary.plan import LONGEST_ROW

View = dict[str, Any]


def build_suite_view(suite: Suite, judged: JudgedSuite) -> View:
    """Return the report of a suite as plain data: that of the route that decides, and the table of all.

    Foreign files hold one route and no forward passes of ours, so that there is no table.
    """
    passed = judged.judged.verdict.exit_code == 0
    runs = [o.judged.measured for o in judged.outcomes if passed and o.judged is not None]
    view = build_view(judged.judged, runs, suite.not_run)
    if suite.base.foreign is not None:
        return view
    view["environment"]["plan"] |= {"mode": suite.base.plan.mode, "alpha": suite.base.plan.alpha}
    view["leading_scenario"] = judged.leading
    view["scenarios"] = [_row(outcome) for outcome in judged.outcomes]
    view["longest_row"] = LONGEST_ROW
    view["forward_passes"] = msgspec.structs.asdict(suite.passes)
    return view


def _row(outcome: Outcome) -> View:
    judged = outcome.judged
    decision = None if judged is None else judged.decision
    diagnosis = None if judged is None else judged.diagnosis
    first = None if decision is None else decision.first_failure
    return {
        "name": outcome.name,
        "finds": outcome.finds,
        "applicable": outcome.verdict is not None,
        "verdict": None if outcome.verdict is None else str(outcome.verdict),
        "kind": None if decision is None else decision.kind,
        "first_failure": None if first is None else str(first),
        "about": None if judged is None else about([judged.measured]),
        "worst_excess": _worst(outcome),
        "n_pairs": 0 if decision is None else sum(item.n_pairs for item in decision.outcomes),
        "diagnosis": None if diagnosis is None else dataclasses.asdict(diagnosis),
        "reasons": list(outcome.reasons),
        "choices": _choices(outcome),
        "rows": [] if judged is None else [prompt.name for prompt in judged.measured.prompts],
    }


def _worst(outcome: Outcome) -> float | None:
    """The largest drift over its rounding bound, over all modes."""
    if outcome.judged is None:
        return None
    found = [climb.excess.largest for climb in outcome.judged.decision.climbs.values()]
    return max((value for value in found if value is not None), default=None)


def _choices(outcome: Outcome) -> list[object]:
    """The choices of a generation loop that prefill's values do not call for."""
    found = () if outcome.judged is None else outcome.judged.decision.evidence
    turned = next((item.detail["turned"] for item in found if item.instrument == CHOICE), ())
    assert isinstance(turned, list | tuple)
    return list(turned)
