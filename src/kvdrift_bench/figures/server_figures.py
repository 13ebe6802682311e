"""The figures of `kvdrift-bench servers`: one table of clean audits, one of planted faults, as Markdown."""

from __future__ import annotations

import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.progress import Progress
from kvdrift_bench.run.server_pool import Pool, Recorded
from kvdrift_bench.run.server_runs import EMBEDDED, TINY, Model, clean_audits, draw, fault_audits, smollm2, tiny

# About what one audit asks for; the exact number is in the table.
_PER_AUDIT = 230
_WEIGHTS = ("Q4_1", "F32")
Kind = Literal["tiny", "smollm2"]


def measure(kinds: Sequence[Kind], answers: int, draws: int, pool: Pool, progress: Progress) -> str:
    """Run all audits that the pool lacks, and return the tables.

    Args:
        kinds: which models: tiny random ones, the embedded SmolLM2.
        answers: clean answers to record of each kind, at least.
        draws: audits to draw from the recorded ones of each kind.
        pool: where recorded audits are kept, and taken from.
        progress: says which audit runs.
    """
    summaries: list[str] = []
    clean: list[str] = []
    faults: list[str] = []
    for kind in kinds:
        with tempfile.TemporaryDirectory() as folder:
            models = [tiny(Path(folder), weights) for weights in _WEIGHTS] if kind == "tiny" else [smollm2()]
            settings = TINY if kind == "tiny" else EMBEDDED
            n_each = max(2, math.ceil(answers / (_PER_AUDIT * len(settings) * len(models))))
            progress.start(len(models) * len(settings) * n_each + 5)
            recorded = []
            for model in models:
                of_model = []
                for audit in clean_audits(model, n_each, settings, pool):
                    progress.step(f"{model.name}, {audit.setting}: {audit.verdict}")
                    of_model.append(audit)
                recorded.append(of_model)
            for name, audit in fault_audits(models[0], pool):
                progress.step(f"{models[0].name}, {name}: {audit.verdict}")
                faults.append(_fault_row(models[0], name, audit))
        drawn = []
        for number, (model, audits) in enumerate(zip(models, recorded, strict=True)):
            share = draws // len(models) + (draws % len(models) if number == 0 else 0)
            found = list(draw(audits, share, number))
            clean += _clean_rows(model, audits)
            clean.append(f"| {model.name} | drawn from these | {len(found)} | | {_verdicts(found)} |")
            drawn += found
        summaries.append(_summary(kind, [audit for audits in recorded for audit in audits], drawn))
    lines = [
        *summaries,
        "",
        "| model | clean server | audits | requests each | verdicts |",
        "|---|---|---|---|---|",
        *clean,
        "",
        "| model | fault | verdict | requests | seconds |",
        "|---|---|---|---|---|",
        *faults,
    ]
    return "\n".join(lines) + "\n"


def _summary(kind: Kind, live: Sequence[Recorded], drawn: Sequence[Verdict]) -> str:
    n_answers = sum(audit.captured.n_requests for audit in live)
    alarms = sum(audit.verdict is Verdict.MISMATCH for audit in live)
    name = "Tiny random models" if kind == "tiny" else "SmolLM2"
    return (
        f"* {name}: {n_answers} recorded answers. Live clean audits: {alarms} of {len(live)} MISMATCH; drawn ones: "
        f"{list(drawn).count(Verdict.MISMATCH)} of {len(drawn)} (alpha 0.001)."
    )


def _clean_rows(model: Model, recorded: Sequence[Recorded]) -> list[str]:
    rows = []
    for setting in dict.fromkeys(audit.setting for audit in recorded):
        audits = [audit for audit in recorded if audit.setting == setting]
        asked = sorted({audit.captured.n_requests for audit in audits})
        span = str(asked[0]) if len(asked) == 1 else f"{asked[0]} to {asked[-1]}"
        rows.append(f"| {model.name} | {setting} | {len(audits)} | {span} | {_verdicts([a.verdict for a in audits])} |")
    return rows


def _fault_row(model: Model, name: str, audit: Recorded) -> str:
    return f"| {model.name} | {name} | {audit.verdict} | {audit.captured.n_requests} | {audit.seconds:.0f} |"


def _verdicts(found: Sequence[Verdict]) -> str:
    return ", ".join(f"{n} {verdict}" for verdict, n in Counter(found).most_common()) or "none"
