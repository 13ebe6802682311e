"""The figures of `kvdrift-bench servers`: one table of clean audits, one of planted faults, as Markdown."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kvdrift.vocabulary.evidence import Verdict
from kvdrift_bench.run.server_runs import SETTINGS, Model, Recorded, clean_audits, draw, fault_audits, smollm2, tiny

# About what one audit asks for; the exact number is in the table.
_PER_AUDIT = 230
_WEIGHTS = ("Q4_1", "F32")


def measure(answers: int, draws: int, embedded: int) -> str:
    """Run all audits and return the tables.

    Args:
        answers: clean answers of tiny models to record, at least.
        draws: audits to draw from the recorded ones.
        embedded: live audits of the clean SmolLM2 at all defaults; with 0 its faults are not planted either.
    """
    clean: list[tuple[Model, list[Recorded]]] = []
    faults: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        models = [tiny(Path(folder), weights) for weights in _WEIGHTS]
        n_each = max(2, math.ceil(answers / (_PER_AUDIT * len(SETTINGS) * len(models))))
        clean += [(model, list(clean_audits(model, n_each, SETTINGS))) for model in models]
        faults += _fault_rows(models[0])
        if embedded:
            default = dict(list(SETTINGS.items())[:1])
            clean.append((smollm2(), list(clean_audits(smollm2(), embedded, default))))
            faults += _fault_rows(smollm2())
    rows, n_drawn, n_alarms = [], 0, 0
    for number, (model, recorded) in enumerate(clean):
        share = draws // len(clean) + (draws % len(clean) if number == 0 else 0)
        drawn = list(draw(recorded, share, number))
        n_drawn += len(drawn)
        n_alarms += drawn.count(Verdict.MISMATCH)
        rows += _clean_rows(model, recorded)
        rows.append(f"| {model.name} | drawn from these | {len(drawn)} | | {_verdicts(drawn)} |")
    live = [audit for _, recorded in clean for audit in recorded]
    n_answers = sum(audit.captured.n_requests for audit in live)
    alarms = sum(audit.verdict is Verdict.MISMATCH for audit in live)
    lines = [
        f"{n_answers} recorded answers. Live clean audits: {alarms} of {len(live)} MISMATCH; drawn ones: {n_alarms} of "
        f"{n_drawn} (alpha 0.001).",
        "",
        "| model | clean server | audits | requests each | verdicts |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "| model | fault | verdict | requests | seconds |",
        "|---|---|---|---|---|",
        *faults,
    ]
    return "\n".join(lines) + "\n"


def _clean_rows(model: Model, recorded: Sequence[Recorded]) -> list[str]:
    rows = []
    for setting in dict.fromkeys(audit.setting for audit in recorded):
        audits = [audit for audit in recorded if audit.setting == setting]
        asked = sorted({audit.captured.n_requests for audit in audits})
        span = str(asked[0]) if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
        rows.append(f"| {model.name} | {setting} | {len(audits)} | {span} | {_verdicts([a.verdict for a in audits])} |")
    return rows


def _fault_rows(model: Model) -> list[str]:
    return [
        f"| {model.name} | {name} | {audit.verdict} | {audit.captured.n_requests} | {audit.seconds:.0f} |"
        for name, audit in fault_audits(model)
    ]


def _verdicts(found: Sequence[Verdict]) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(found).most_common()) or "none"
