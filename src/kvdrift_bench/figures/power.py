"""How sharp the directed tests are and how honest their p-values, from clean runs and faults of known size.

Knows records only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from kvdrift_bench.figures.intervals import exact_interval
from kvdrift_bench.run.records import NATIVE, Judged, Record

# Under H0 a p-value is at most p with chance p. The figures show it at these.
LEVELS = (0.001, 0.01, 0.05, 0.1, 0.25, 0.5)


class Calibration(msgspec.Struct, frozen=True):
    """Of `n` clean runs with a p-value, how many had one of at most `level`; `interval` is exact, 95 %."""

    level: float
    n: int
    at_most: int

    @property
    def interval(self) -> tuple[float, float]:
        return exact_interval(self.at_most, self.n)


class Minimum(msgspec.Struct, frozen=True):
    """The smallest size of `cause` that a default audit claims to see in one setting: median over the clean runs."""

    cause: str
    setting: str
    size: float
    n: int


class Estimate(msgspec.Struct, frozen=True):
    """Runs of a fault of known size in one setting: what it was, and what the directed tests gave.

    Attributes:
        runs: in how many it was committed and the directed tests could judge.
        estimates: the sizes that they gave, of the runs in which they saw one.
        minimum: the smallest size that they claimed to see, median of the runs; None where the fault is not in all
            layers alike, which is what the claim is about.
        unkept: runs in which its size was above what that very run claimed to see, and it was not seen.
    """

    fault: str
    setting: str
    truth: float
    runs: int
    estimates: tuple[float, ...]
    minimum: float | None
    unkept: int

    @property
    def is_below(self) -> bool:
        """Whether the planted size is below the stated minimum."""
        return self.minimum is not None and abs(self.truth) <= self.minimum

    @property
    def estimate(self) -> float | None:
        """The median of the estimates, None if there is none."""
        return median(self.estimates) if self.estimates else None


class Power(msgspec.Struct, frozen=True):
    """All three; empty where no run had aligned inputs at a half-precision dtype."""

    calibration: list[Calibration]
    minima: list[Minimum]
    estimates: list[Estimate]

    @property
    def minima_by_cause(self) -> dict[str, dict[str, float]]:
        """The sizes by cause, in alphabetical order, and setting."""
        causes: dict[str, dict[str, float]] = {}
        for item in sorted(self.minima, key=lambda item: item.cause):
            causes.setdefault(item.cause, {})[item.setting] = item.size
        return causes


def measure_power(records: Iterable[Record]) -> Power:
    """Return the figures of `records`, from kvdrift's judgement at the native dtype alone."""
    judged = [(record, item) for record in records if (item := _judged(record)) is not None]
    clean = [(record, item) for record, item in judged if record.kind == "clean"]
    p_values = [item.p_value for _, item in clean if item.p_value is not None]
    calibration = [Calibration(level, len(p_values), sum(p <= level for p in p_values)) for level in LEVELS]
    sized: dict[tuple[str, str], list[tuple[Record, Judged]]] = {}
    for record, item in judged:
        if record.kind == "fault" and record.amount is not None and item.p_value is not None and record.changed:
            sized.setdefault((record.name, record.setting), []).append((record, item))
    estimates = [_estimate(fault, setting, runs) for (fault, setting), runs in sized.items()]
    return Power(calibration if p_values else [], _minima(clean), estimates)


def _estimate(fault: str, setting: str, runs: Sequence[tuple[Record, Judged]]) -> Estimate:
    record = runs[0][0]
    cause, truth = record.cause or "", record.amount or 0.0
    claims = [item.minimum[cause] for record, item in runs if record.in_all_layers and cause in item.minimum]
    unkept = [
        item
        for record, item in runs
        if record.in_all_layers and abs(truth) > item.minimum.get(cause, float("inf")) and cause not in item.estimates
    ]
    return Estimate(
        fault,
        setting,
        truth,
        len(runs),
        tuple(item.estimates[cause] for _, item in runs if cause in item.estimates),
        median(claims) if claims else None,
        len(unkept),
    )


def _judged(record: Record) -> Judged | None:
    return next(iter([record.kvdrift[NATIVE]] if NATIVE in record.kvdrift else record.kvdrift.values()), None)


def _minima(clean: Sequence[tuple[Record, Judged]]) -> list[Minimum]:
    sizes: dict[tuple[str, str], list[float]] = {}
    for record, item in clean:
        for cause, size in item.minimum.items():
            sizes.setdefault((cause, record.setting), []).append(size)
    return [Minimum(cause, setting, median(found), len(found)) for (cause, setting), found in sorted(sizes.items())]
