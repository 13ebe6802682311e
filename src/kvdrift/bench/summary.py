"""Figures of a benchmark from its records: kvdrift's own, by class and dtype, with their confidence intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec

from kvdrift.bench.intervals import exact_interval
from kvdrift.bench.peer_summary import PeerFigures, compare_peers
from kvdrift.bench.power import Power, measure_power
from kvdrift.bench.records import LADDER, NATIVE, Judged, Record

WAYS = (LADDER, NATIVE)
JudgedOrNot = tuple[Record, Judged | None]


class Share(msgspec.Struct, frozen=True):
    """Hits among trials. `share` is None where nothing was tried: no trial is no success."""

    hits: int
    trials: int

    @property
    def share(self) -> float | None:
        return self.hits / self.trials if self.trials else None

    @property
    def interval(self) -> tuple[float, float]:
        """The exact 95 % confidence interval; from 0 to 1 where nothing was tried."""
        return exact_interval(self.hits, self.trials)

    def as_json(self) -> dict[str, Any]:
        low, high = self.interval
        return {"hits": self.hits, "trials": self.trials, "share": self.share, "interval_95": [low, high]}


class WayFigures(msgspec.Struct, kw_only=True):
    """How kvdrift did in one way of judging.

    Attributes:
        detected: MISMATCH among all faults that changed a tensor.
        detected_above: the same among those whose effect is above what the audit says it can see.
        right_address, right_layer: among the detected.
        right_cause: among the detected that a diagnosis was tried on, "unexplained" counting as wrong, unless no trace
            holds what the cause would be told by: such a fault counts only where it is given a cause.
        named_wrongly: of those, how many were given another cause instead of none.
        clean, twins: MISMATCH among the clean runs and the clean twins: false alarms.
        unsure: clean runs and twins that ended INCONCLUSIVE or broke off.
        by_class, by_dtype: `detected`, `right_layer` and `right_address` by mechanism and by dtype.
        alarms_by_dtype: `clean` and `twins` by dtype.
        missed, misplaced, misnamed: faults by name and setting.
        alarms, doubts: the false alarms and the unsure ones likewise.
    """

    detected: Share
    detected_above: Share
    right_address: Share
    right_layer: Share
    right_cause: Share
    named_wrongly: int
    clean: Share
    twins: Share
    unsure: Share
    by_class: dict[str, tuple[Share, Share, Share]]
    by_dtype: dict[str, tuple[Share, Share, Share]]
    alarms_by_dtype: dict[str, tuple[Share, Share]]
    missed: list[str]
    misplaced: list[str]
    misnamed: list[str]
    alarms: list[str]
    doubts: list[str]


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
        ways={way: _way(way, faults, harmless) for way in ways},
        peers=compare_peers(faults, harmless),
        power=measure_power(ran),
    )


def as_json(summary: Summary) -> dict[str, Any]:
    """Return the summary as plain values, each share with its interval."""
    plain = msgspec.to_builtins(summary)
    for way, figures in summary.ways.items():
        target = plain["ways"][way]
        for name in WayFigures.__struct_fields__:
            value = getattr(figures, name)
            if isinstance(value, Share):
                target[name] = value.as_json()
        target["alarms_by_dtype"] = {
            dtype: dict(zip(("clean", "twins"), (s.as_json() for s in shares), strict=True))
            for dtype, shares in figures.alarms_by_dtype.items()
        }
        for name in ("by_class", "by_dtype"):
            target[name] = {
                key: dict(zip(("detected", "right_layer", "right_address"), (s.as_json() for s in shares), strict=True))
                for key, shares in getattr(figures, name).items()
            }
    return dict(plain)


def _way(way: str, faults: Sequence[Record], harmless: Sequence[Record]) -> WayFigures:
    # A run that broke off has no judgement; a fault that broke it was not found, a clean one is no pass.
    judged = [(record, record.kvdrift.get(way)) for record in faults]
    found = [(record, item) for record, item in judged if item is not None and item.is_mismatch]
    diagnosed = [(record, item) for record, item in found if item.right_cause is not None]
    above = [(record, item) for record, item in judged if item is not None and item.above]
    clean = [(record, record.kvdrift.get(way)) for record in harmless]
    unsure = [(record, item) for record, item in clean if item is None or item.verdict == "INCONCLUSIVE"]
    alarms = [(record, item) for record, item in clean if item is not None and item.is_mismatch]
    return WayFigures(
        detected=Share(len(found), len(judged)),
        detected_above=Share(sum(item.is_mismatch for _, item in above), len(above)),
        right_address=Share(sum(bool(item.right_address) for _, item in found), len(found)),
        right_layer=Share(sum(bool(item.right_layer) for _, item in found), len(found)),
        right_cause=Share(sum(bool(item.right_cause) for _, item in diagnosed), len(diagnosed)),
        named_wrongly=sum(not item.right_cause and item.cause != "unexplained" for _, item in diagnosed),
        clean=_alarms(alarms, clean, "clean"),
        twins=_alarms(alarms, clean, "twin"),
        unsure=Share(len(unsure), len(clean)),
        by_class=_by(judged, lambda record: record.mechanism or "?"),
        by_dtype=_by(judged, lambda record: record.dtype),
        alarms_by_dtype={
            dtype: (_alarms(alarms, some, "clean"), _alarms(alarms, some, "twin"))
            for dtype, some in _grouped_by_dtype(clean).items()
        },
        missed=[f"{_named(record)}: {_said(record, item)}" for record, item in judged if (record, item) not in found],
        misplaced=[
            f"{_named(record)}: {item.address}, planted at {_places(record)}"
            for record, item in found
            if not item.right_address
        ],
        misnamed=[
            f"{_named(record)}: {item.cause}, planted {record.cause}"
            for record, item in diagnosed
            if not item.right_cause
        ],
        alarms=[f"{_named(record)}: {item.address}" for record, item in alarms],
        doubts=[f"{_named(record)}: {_said(record, item)}" for record, item in unsure],
    )


def _alarms(alarms: Sequence[tuple[Record, Judged]], clean: Sequence[JudgedOrNot], kind: str) -> Share:
    """False alarms among the runs of one kind."""
    keys = {record.key for record, _ in alarms}
    tried = [record for record, _ in clean if record.kind == kind]
    return Share(sum(record.key in keys for record in tried), len(tried))


def _grouped_by_dtype(items: Iterable[JudgedOrNot]) -> dict[str, list[JudgedOrNot]]:
    groups: dict[str, list[JudgedOrNot]] = {}
    for record, item in items:
        groups.setdefault(record.dtype, []).append((record, item))
    return groups


def _by(
    judged: Iterable[tuple[Record, Judged | None]], key: Callable[[Record], str]
) -> dict[str, tuple[Share, Share, Share]]:
    """Detected, right layer and right address by a key of the record, in the order of the keys."""
    groups: dict[str, list[Judged | None]] = {}
    for record, item in judged:
        groups.setdefault(key(record), []).append(item)
    result = {}
    for name in sorted(groups):
        found = [item for item in groups[name] if item is not None and item.is_mismatch]
        result[name] = (
            Share(len(found), len(groups[name])),
            Share(sum(bool(item.right_layer) for item in found), len(found)),
            Share(sum(bool(item.right_address) for item in found), len(found)),
        )
    return result


def _named(record: Record) -> str:
    """The subject and its setting."""
    name = record.prompts if record.kind == "clean" else record.name
    return f"{name} ({record.setting})"


def _said(record: Record, item: Judged | None) -> str:
    if item is None:
        return record.error or "not judged"
    reasons = f": {item.reasons[0]}" if item.reasons else ""
    return f"{item.verdict}{reasons if item.verdict == 'INCONCLUSIVE' else ''}"


def _places(record: Record) -> str:
    return " or ".join(f"layer {layer} / {site}" if layer is not None else site for layer, site in record.places)


def _reason(text: str | None) -> str:
    """The reason without what is particular to one subject."""
    return (text or "").strip()
