"""The status of every compared value at the native rung: equal, drifting, beyond rounding, or without a partner."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from kvdrift.measure.measured import Measured
from kvdrift.pairing.rows import DriftRow
from kvdrift.verdict.decide import Decision
from kvdrift.vocabulary.address import Address, Place


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """One value. `token_id` is None where it is not known; `first` is the first address of the same prompt and position
    that is beyond rounding, None if none is, or none at or before this value."""

    mode: str
    prompt: str
    position: int
    place: Place
    status: Literal["PASS", "DRIFT", "FAIL", "TRACE_OFFSET"]
    token_id: int | None = None
    first: Address | None = None
    is_first: bool = False


def statuses(measured: Measured, decision: Decision) -> Iterator[Status]:
    """Yield every value of the native rung, mode by mode: PASS has the same bits, DRIFT differs by no more than
    rounding can or where nothing bounds it, FAIL is beyond rounding, TRACE_OFFSET has no partner, or stands at another
    position in decode."""
    for mode in measured.modes:
        shifted = set() if measured.foreign is None else {o.prompt for o in measured.foreign.offsets if o.mode is mode}
        beyond = decision.natives[mode].beyond
        first: dict[tuple[str, int], Address] = {}
        for address in sorted(beyond, key=lambda a: a.forward_rank):
            first.setdefault((address.prompt, address.position), address)
        for row in sorted(measured.table.select(mode, measured.info.dtype), key=_order):
            status = _status(row, mode, first.get((row.prompt, row.position)), row.address in beyond)
            yield replace(status, status="TRACE_OFFSET") if row.prompt in shifted else status
        for label, _, value in measured.table.unpaired:
            if label == mode:
                place = Place(value.layer, value.site)
                yield Status(
                    mode=mode, prompt=value.prompt, position=value.position, place=place, status="TRACE_OFFSET"
                )


def _status(row: DriftRow, mode: str, first: Address | None, is_beyond: bool) -> Status:
    follows = first is not None and not row.equal and row.place.forward_rank >= first.forward_rank
    return Status(
        mode=mode,
        prompt=row.prompt,
        position=row.position,
        place=row.place,
        status="PASS" if row.equal else ("FAIL" if is_beyond else "DRIFT"),
        token_id=row.token_id,
        first=first if follows else None,
        is_first=follows and row.address == first,
    )


def _order(row: DriftRow) -> tuple[object, ...]:
    return (row.prompt, row.position, row.place.forward_rank)
