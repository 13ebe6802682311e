"""Instrument 1: equal bits end the matter for a pair; how many there are is evidence for the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from kvdrift.instruments.base import Blind, Judges, Panel, Run, Seen
from kvdrift.instruments.route import Route
from kvdrift.pairing.drift import DriftTable
from kvdrift.vocabulary.evidence import Evidence


def compare_bits(table: DriftTable, mode: str, native: str, routes: Sequence[Route]) -> Evidence:
    """Count the pairs of `mode` that have the same bits at the native dtype.

    Valid only with path proof: equal bits of one route run twice say nothing.
    """
    rows = table.select(mode, native)
    n_equal = int(rows.equal.sum())
    problems = [problem for route in routes if route.mode == mode for problem in route.problems]
    proven = any(route.mode == mode for route in routes) and not problems
    share = n_equal / len(rows) if len(rows) else None
    text = f"{n_equal} of {len(rows)} pairs have the same bits at {native}"
    return Evidence(
        instrument="bits",
        mode=mode,
        statistic_name="share of pairs with equal bits",
        statistic=share,
        supports="H0" if proven and share == 1.0 else None,
        valid=proven and len(rows) > 0,
        reason=None if proven and len(rows) else ("; ".join(dict.fromkeys(problems)) or "nothing was compared"),
        text=text,
        detail={"n_equal": n_equal, "n_pairs": len(rows), "path_proof": proven},
    )


class Bits(Blind):
    """Counts the pairs of a mode that have the same bits."""

    name: ClassVar[str] = "bits"
    judges: ClassVar[Judges] = "mode"

    def judge(self, run: Run, mode: str, panel: Panel) -> Seen:
        """Count them at the native dtype; valid with path proof alone."""
        return Seen(evidence=(compare_bits(run.table, mode, run.info.dtype, run.routes),))
