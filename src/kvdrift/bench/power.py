"""How sharp the directed tests are and how honest their p-values, from clean runs and faults of known size.

Knows records only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import median

import msgspec

from kvdrift.bench.intervals import exact_interval
from kvdrift.bench.records import NATIVE, Judged, Record

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
    """A fault of known size in one setting: what it was, and what the directed tests gave; None where they saw none."""

    fault: str
    setting: str
    truth: float
    estimate: float | None


class Power(msgspec.Struct, frozen=True):
    """All three; empty where no run had aligned inputs at a half-precision dtype."""

    calibration: list[Calibration]
    minima: list[Minimum]
    estimates: list[Estimate]


def measure_power(records: Iterable[Record]) -> Power:
    """Return the figures of `records`, from kvdrift's judgement at the native dtype alone."""
    judged = [(record, item) for record in records if (item := _judged(record)) is not None]
    clean = [(record, item) for record, item in judged if record.kind == "clean"]
    p_values = [item.p_value for _, item in clean if item.p_value is not None]
    calibration = [Calibration(level, len(p_values), sum(p <= level for p in p_values)) for level in LEVELS]
    estimates = [
        Estimate(record.name, record.setting, record.amount, item.estimates.get(record.cause or ""))
        for record, item in judged
        if record.kind == "fault" and record.amount is not None and item.p_value is not None and record.changed
    ]
    return Power(calibration if p_values else [], _minima(clean), estimates)


def _judged(record: Record) -> Judged | None:
    return next(iter([record.kvdrift[NATIVE]] if NATIVE in record.kvdrift else record.kvdrift.values()), None)


def _minima(clean: Sequence[tuple[Record, Judged]]) -> list[Minimum]:
    sizes: dict[tuple[str, str], list[float]] = {}
    for record, item in clean:
        for cause, size in item.minimum.items():
            sizes.setdefault((cause, record.setting), []).append(size)
    return [Minimum(cause, setting, median(found), len(found)) for (cause, setting), found in sorted(sizes.items())]
