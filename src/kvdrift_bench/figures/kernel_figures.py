"""What the audits of kernels show: alarms and INCONCLUSIVE of correct ones, and how many faults were found where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from kvdrift_bench.figures.shares import Share

if TYPE_CHECKING:  # what runs the kernels loads torch
    from kvdrift_bench.run.kernel_runs import KernelRun

_PASSED = ("EXACT", "STRUCTURAL_DRIFT")
# What is judged apart: the ladder and the native dtype alone promise different things.
_LADDERS = {"model": "with the ladder", "off": "native dtype alone"}


@dataclass(slots=True)
class Ended:
    """Audits of one kind: how many, and how they ended."""

    runs: list[KernelRun] = field(default_factory=list)

    def count(self, *verdicts: str) -> int:
        """Return how many ended with one of these verdicts."""
        return sum(run.verdict in verdicts for run in self.runs)

    @property
    def passed(self) -> int:
        return self.count(*_PASSED)

    @property
    def alarms(self) -> int:
        return self.count("MISMATCH")

    @property
    def unsure(self) -> int:
        """Those without a verdict, and those that broke off."""
        return len(self.runs) - self.passed - self.alarms

    @property
    def alarm_share(self) -> Share:
        return Share(self.alarms, len(self.runs))

    @property
    def at_address(self) -> int:
        return sum(run.right is True for run in self.runs)

    @property
    def reasons(self) -> dict[str, int]:
        """Why runs were not judged, and how many of each."""
        unsure = [run for run in self.runs if run.verdict not in (*_PASSED, "MISMATCH")]
        return dict(Counter(_reason(run) for run in unsure).most_common())


def _reason(run: KernelRun) -> str:
    return run.error or next(iter(run.reasons), "no reason given")


@dataclass(frozen=True, slots=True)
class KernelFigures:
    """All runs.

    Attributes:
        whole: correct kernels in the grid, drawn ones, and faults, by the ladder.
        by_kernel: the runs of each correct kernel in the grid, by its name.
        by_fault: those of each fault.
        by_draw: drawn runs, by the length of their longest prompt, the span or the model.
        unwanted: correct ones that alarmed.
        missed: faults that were not called a mismatch, or not where they are.
    """

    runs: Sequence[KernelRun]
    whole: dict[tuple[str, str], Ended]
    by_kernel: dict[str, dict[str, Ended]]
    by_fault: dict[str, dict[str, Ended]]
    by_draw: dict[str, Ended]
    unwanted: list[KernelRun]
    missed: list[KernelRun]

    @property
    def seconds(self) -> float:
        return sum(run.seconds for run in self.runs)


def summarise_kernels(runs: Iterable[KernelRun]) -> KernelFigures:
    """Count how the audits ended."""
    figures = KernelFigures(list(runs), {}, {}, {}, {}, [], [])
    for run in figures.runs:
        ladder = _LADDERS[run.ladder]
        figures.whole.setdefault((run.kind, ladder), Ended()).runs.append(run)
        if run.kind == "fault":
            figures.by_fault.setdefault(run.name, {}).setdefault(ladder, Ended()).runs.append(run)
            if run.verdict != "MISMATCH" or not run.right:
                figures.missed.append(run)
            continue
        if run.verdict == "MISMATCH":
            figures.unwanted.append(run)
        if run.kind == "kernel":
            figures.by_kernel.setdefault(run.name, {}).setdefault(ladder, Ended()).runs.append(run)
        else:
            for label in _labels(run):
                figures.by_draw.setdefault(label, Ended()).runs.append(run)
    return figures


def _labels(run: KernelRun) -> list[str]:
    """The groups of draws that a run belongs to."""
    longest = max(run.lengths)
    found = [run.dtype, f"model {run.model}"]
    if longest >= 500:
        found.append(f"a prompt of {longest:,} tokens")
    if run.span >= 32:
        found.append(f"span {run.span}")
    return found
