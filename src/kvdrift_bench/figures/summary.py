"""Figures of a benchmark from its records: kvdrift's own, by class and dtype, with their confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import msgspec

from kvdrift.vocabulary.causes import Cause
from kvdrift_bench.figures.power import Power, measure_power
from kvdrift_bench.figures.shares import Share
from kvdrift_bench.peers.summary import PeerFigures, compare_peers
from kvdrift_bench.run.records import LADDER, NATIVE, Judged, Record

WAYS = (LADDER, NATIVE)


class Figures(msgspec.Struct, kw_only=True):
    """How kvdrift did on some runs in one way of judging.

    INCONCLUSIVE is not a verdict: it is neither a fault found nor a false alarm.

    Attributes:
        detected: MISMATCH among all faults that changed a tensor.
        undecided: INCONCLUSIVE among them.
        detected_above, undecided_above: the same among those whose effect is above what the audit says it can see.
        right_address, right_layer: among the detected.
        right_cause: among the detected that a diagnosis was tried on, "unexplained" counting as wrong, unless no trace
            holds what the cause would be told by: such a fault counts only where it is given a cause.
        named_wrongly: of those, how many were given another cause instead of none.
        clean, twins: MISMATCH among the clean runs and the clean twins: false alarms.
        unsure: clean runs and twins that ended INCONCLUSIVE or broke off.
    """

    detected: Share
    undecided: Share
    detected_above: Share
    undecided_above: Share
    right_address: Share
    right_layer: Share
    right_cause: Share
    named_wrongly: int
    clean: Share
    twins: Share
    unsure: Share


class DtypeFigures(Figures, kw_only=True):
    """Figures of one dtype, or of all of them, with those of every class of mechanism and of every fault."""

    by_class: dict[str, Figures]
    by_fault: dict[str, Figures]


class WayFigures(DtypeFigures, kw_only=True):
    """How kvdrift did in one way of judging.

    Attributes:
        by_dtype: the figures of each native dtype.
        missed, misplaced, misnamed: faults by name and setting; a fault without a verdict is not among the missed.
        alarms: the false alarms likewise.
        doubts: runs without a verdict, counted by kind and reason.
    """

    by_dtype: dict[str, DtypeFigures]
    missed: list[str]
    misplaced: list[str]
    misnamed: list[str]
    alarms: list[str]
    doubts: dict[str, int]


class Summary(msgspec.Struct, kw_only=True):
    """All figures of one benchmark.

    `without_effect` names faults that were committed and changed nothing, `skipped` counts the subjects that were not
    run, by reason, and `broken` names those that broke off.
    """

    n_records: int
    settings: list[str]
    n_faults: int
    n_twins: int
    n_clean: int
    n_tensors: int
    skipped: dict[str, int]
    without_effect: list[str]
    broken: list[str]
    ways: dict[str, WayFigures]
    peers: list[PeerFigures]
    power: Power


def summarise(records: Sequence[Record]) -> Summary:
    """Return the figures of `records`."""
    ran = [record for record in records if record.skipped is None]
    faults = [record for record in ran if record.kind == "fault" and record.changed > 0]
    harmless = [record for record in ran if record.kind != "fault"]
    ways = [way for way in WAYS if any(way in record.kvdrift for record in ran)]
    return Summary(
        n_records=len(records),
        settings=list(dict.fromkeys(record.setting for record in ran)),
        n_faults=len(faults),
        n_twins=sum(record.kind == "twin" for record in harmless),
        n_clean=sum(record.kind == "clean" for record in harmless),
        n_tensors=sum(record.n_tensors for record in ran),
        skipped=dict(Counter(_reason(record.skipped) for record in records if record.skipped is not None)),
        without_effect=[
            _named(record) for record in ran if record.kind == "fault" and not record.changed and not record.error
        ],
        broken=[f"{_named(record)}: {record.error}" for record in ran if record.error is not None],
        ways={way: _way(_Runs(way, [*faults, *harmless])) for way in ways},
        peers=compare_peers(faults, harmless),
        power=measure_power(ran),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain values, each share with its interval."""
    return dict(_plain(summary))


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return value.as_json()
    if isinstance(value, msgspec.Struct):
        return {name: _plain(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class _Runs:
    """Some records with their judgements in one way. A run that broke off has none: a fault that broke it was not
    found, a clean one is not a pass."""

    way: str
    records: Sequence[Record]

    def of(self, key: Callable[[Record], str]) -> dict[str, _Runs]:
        """Return the runs by a key of the record, in its order."""
        groups: dict[str, list[Record]] = {}
        for record in self.records:
            groups.setdefault(key(record), []).append(record)
        return {name: _Runs(self.way, groups[name]) for name in sorted(groups)}

    @cached_property
    def faults(self) -> list[tuple[Record, Judged | None]]:
        return [(record, record.kvdrift.get(self.way)) for record in self.records if record.kind == "fault"]

    @cached_property
    def harmless(self) -> list[tuple[Record, Judged | None]]:
        return [(record, record.kvdrift.get(self.way)) for record in self.records if record.kind != "fault"]

    @cached_property
    def found(self) -> list[tuple[Record, Judged]]:
        return [(record, item) for record, item in self.faults if item is not None and item.is_mismatch]

    @cached_property
    def diagnosed(self) -> list[tuple[Record, Judged]]:
        return [(record, item) for record, item in self.found if item.right_cause is not None]

    @cached_property
    def alarms(self) -> list[tuple[Record, Judged]]:
        return [(record, item) for record, item in self.harmless if item is not None and item.is_mismatch]

    def figures(self) -> dict[str, Any]:
        """Return the fields of `Figures`."""
        items = [item for _, item in self.faults]
        found, named = [item for _, item in self.found], [item for _, item in self.diagnosed]
        above = [item for item in items if item is not None and item.above]
        return {
            "detected": Share(len(found), len(items)),
            "undecided": Share(sum(item is not None and item.is_inconclusive for item in items), len(items)),
            "detected_above": Share(sum(item.is_mismatch for item in above), len(above)),
            "undecided_above": Share(sum(item.is_inconclusive for item in above), len(above)),
            "right_address": Share(sum(bool(item.right_address) for item in found), len(found)),
            "right_layer": Share(sum(bool(item.right_layer) for item in found), len(found)),
            "right_cause": Share(sum(bool(item.right_cause) for item in named), len(named)),
            "named_wrongly": sum(not item.right_cause and item.cause != Cause.UNEXPLAINED for item in named),
            "clean": self._alarms("clean"),
            "twins": self._alarms("twin"),
            "unsure": Share(sum(i is None or i.is_inconclusive for _, i in self.harmless), len(self.harmless)),
        }

    def _alarms(self, kind: str) -> Share:
        tried = [item for record, item in self.harmless if record.kind == kind]
        return Share(sum(item is not None and item.is_mismatch for item in tried), len(tried))

    def grouped(self) -> dict[str, Any]:
        """Return the fields of `DtypeFigures`."""
        faults = _Runs(self.way, [record for record, _ in self.faults])
        return {
            **self.figures(),
            "by_class": {name: Figures(**runs.figures()) for name, runs in faults.of(_mechanism).items()},
            "by_fault": {name: Figures(**runs.figures()) for name, runs in faults.of(lambda r: r.name).items()},
        }


def _way(runs: _Runs) -> WayFigures:
    undecided = [(record, item) for record, item in (*runs.faults, *runs.harmless) if item and item.is_inconclusive]
    return WayFigures(
        **runs.grouped(),
        by_dtype={name: DtypeFigures(**some.grouped()) for name, some in runs.of(lambda r: r.dtype).items()},
        missed=[
            f"{_named(record)}: {record.error or 'not judged' if item is None else item.verdict}"
            for record, item in runs.faults
            if item is None or not (item.is_mismatch or item.is_inconclusive)
        ],
        misplaced=[
            f"{_named(record)}: {item.address}, planted at {_places(record)}"
            for record, item in runs.found
            if not item.right_address
        ],
        misnamed=[
            f"{_named(record)}: {item.cause}, planted {record.cause}"
            for record, item in runs.diagnosed
            if not item.right_cause
        ],
        alarms=[f"{_named(record)}: {item.address}" for record, item in runs.alarms],
        doubts=dict(Counter(f"{r.kind} at {r.dtype}: {'; '.join(i.reasons[:1])}" for r, i in undecided).most_common()),
    )


def _mechanism(record: Record) -> str:
    return record.mechanism or "?"


def _named(record: Record) -> str:
    """The subject and its setting."""
    name = record.prompts if record.kind == "clean" else record.name
    others = f" on {record.prompts}" if record.kind != "clean" and record.prompts != "set_0" else ""
    return f"{name}{others} ({record.setting})"


def _places(record: Record) -> str:
    return " or ".join(f"layer {layer} / {site}" if layer is not None else site for layer, site in record.places)


def _reason(text: str | None) -> str:
    """The reason without what is particular to one subject."""
    return (text or "").strip()
