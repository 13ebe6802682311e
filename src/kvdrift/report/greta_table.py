"""The table of GRETA StageTrace files as their own analyser names it: one line for every compared tensor."""

from __future__ import annotations

from collections.abc import Iterator

from kvdrift.trace.recording import UNKNOWN_TOKEN
from kvdrift.verdict.judge import Judged
from kvdrift.verdict.statuses import Status, statuses

COLUMNS = ("prompt", "token_id", "pos_id", "layer", "tensor", "status", "first_fail", "root_cause", "mode")
NONE = "-"


def table(judged: Judged) -> Iterator[tuple[str, ...]]:
    """Yield a line for every value of the native rung. The root cause of a value is the first failing site of the same
    prompt and position."""
    for status in statuses(judged.measured, judged.decision):
        yield _line(status)


def _line(status: Status) -> tuple[str, ...]:
    cause = NONE if status.first is None else f"{str(status.first.site).upper()}_DRIFT"
    offset = status.status == "TRACE_OFFSET"
    token = NONE if status.token_id is None or status.token_id == UNKNOWN_TOKEN else str(status.token_id)
    return (
        status.prompt,
        token,
        str(status.position),
        str(-1 if status.place.layer is None else status.place.layer),
        status.place.site,
        status.status,
        status.status if offset else (cause if status.is_first else NONE),
        status.status if offset else cause,
        status.mode,
    )
