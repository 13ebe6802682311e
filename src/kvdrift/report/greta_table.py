"""The report of GRETA StageTrace files as their own analyser names it: FILE.md, and FILE.tsv with every tensor."""

from __future__ import annotations

from collections.abc import Iterator

from kvdrift.compare.align import Unpaired
from kvdrift.compare.rows import DriftRow, layer_code
from kvdrift.trace.recording import UNKNOWN_TOKEN
from kvdrift.verdict.judge import Judged
from kvdrift.vocabulary.address import Address

COLUMNS = ("prompt", "token_id", "pos_id", "layer", "tensor", "status", "first_fail", "root_cause", "mode")
TRACE_OFFSET = "TRACE_OFFSET"
NONE = "-"


def table(judged: Judged) -> Iterator[tuple[str, ...]]:
    """Yield a line for every value of the native rung: PASS has the same bits, DRIFT differs by no more than rounding
    can or where nothing bounds it, FAIL is beyond rounding, TRACE_OFFSET has no partner. The root cause is the first
    failing site of the same prompt and position."""
    measured, decision = judged.measured, judged.decision
    for mode in measured.modes:
        beyond = set(decision.natives[mode].beyond)
        first: dict[tuple[str, int], Address] = {}  # by prompt and position
        for address in sorted(decision.natives[mode].beyond, key=lambda a: a.forward_rank):
            first.setdefault((address.prompt, address.position), address)
        for row in sorted(measured.table.select(mode, measured.info.dtype), key=_order):
            yield _line(row, mode, first.get((row.prompt, row.position)), row.address in beyond)
        for label, _, value in measured.table.unpaired:
            if label == mode:
                yield _unpaired(value, mode)


def _line(row: DriftRow, mode: str, first: Address | None, is_beyond: bool) -> tuple[str, ...]:
    status = "PASS" if row.equal else ("FAIL" if is_beyond else "DRIFT")
    cause = _cause(first) if first is not None and not row.equal and _follows(row, first) else NONE
    is_first = first is not None and row.address == first
    return (
        row.prompt,
        NONE if row.token_id == UNKNOWN_TOKEN else str(row.token_id),
        str(row.position),
        str(layer_code(row.layer)),
        row.site,
        status,
        cause if is_first else NONE,
        cause,
        mode,
    )


def _unpaired(value: Unpaired, mode: str) -> tuple[str, ...]:
    where = (value.prompt, NONE, str(value.position), str(layer_code(value.layer)), str(value.site))
    return (*where, TRACE_OFFSET, TRACE_OFFSET, TRACE_OFFSET, mode)


def _follows(row: DriftRow, first: Address) -> bool:
    return row.place.forward_rank >= first.forward_rank


def _cause(first: Address) -> str:
    return f"{str(first.site).upper()}_DRIFT"


def _order(row: DriftRow) -> tuple[object, ...]:
    return (row.prompt, row.position, row.place.forward_rank)
