"""What the gate and three other rules made of clean runs and of planted faults."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kvdrift_bench.figures.shares import Share, percent

if TYPE_CHECKING:  # what runs the gate loads torch
    from kvdrift_bench.run.gate_runs import GateRun


def render_gate(runs: Sequence[GateRun], rules: Sequence[tuple[str, str]], command: str) -> str:
    """Return the figures as Markdown: a row for kvdrift and for each rule, and every run that was wrong."""
    clean, faults = [r for r in runs if r.fault is None], [r for r in runs if r.fault is not None]
    rows = [
        (
            "kvdrift gate",
            "any verdict but EXACT and STRUCTURAL_DRIFT",
            [r.is_red for r in clean],
            [r.is_red for r in faults],
        )
    ]
    rows += [
        (name, formula, [r.peers.get(name, False) for r in clean], [r.peers.get(name, False) for r in faults])
        for name, formula in rules
    ]
    lines = [
        f"`{command}`",
        "",
        "| rule | red if | clean runs that are red | faults that are red |",
        "|---|---|---|---|",
        *(f"| {name} | {_escaped(formula)} | {_cell(red)} | {_cell(found)} |" for name, formula, red, found in rows),
        "",
    ]
    n_right = sum(r.right is True for r in faults)
    lines.append(f"Of the faults, {n_right} of {len(faults)} are red at the tensor where they were planted.")
    wrong = [r for r in clean if r.is_red] + [r for r in faults if not r.is_red]
    if wrong:
        lines += ["", "Wrong:", "", *(f"* {_told(r)}" for r in wrong)]
    return "\n".join(lines) + "\n"


def _escaped(formula: str) -> str:
    return formula.replace("|", "\\|")


def _cell(hits: Sequence[bool]) -> str:
    share = Share(sum(hits), len(hits))
    if share.share is None:
        return "not run"
    low, high = share.interval
    return f"{share.hits} of {share.trials} ({percent(low)} to {percent(high)})"


def _told(run: GateRun) -> str:
    what = run.fault or "clean"
    how = f"{run.model} {run.dtype} {run.attention}, {run.threads} threads, kernel {run.kernel or 'torch'}"
    return f"{what} {run.number} ({how}{', batched' if run.batched else ''}): {run.verdict or run.error}"
