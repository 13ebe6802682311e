"""What a worker does for a cell: audits it, and leaves its run directory and its result."""

from __future__ import annotations

import errno
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from kvdrift.engines.open import find_engine, require_place
from kvdrift.errors import KvdriftError
from kvdrift.pipeline.audit import audit_engine
from kvdrift.pipeline.compare import compare
from kvdrift.sweep.cells import CellState, SweepCell, plan_of
from kvdrift.sweep.files import StoreError
from kvdrift.sweep.spec import SweepSpec
from kvdrift.sweep.store import CellResult, SweepDirectory
from kvdrift.vocabulary.evidence import Verdict
from kvdrift.vocabulary.plan import Prompts
from kvdrift.vocabulary.progress import Silent

RUN_CELL = "kvdrift.sweep.work:run_cell"
_NO_SPACE = "no space left"
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
# The model that this process holds, open, and what it was opened for.
_held: dict[str, Any] = {}
_STATES = {Verdict.MISMATCH: CellState.FAIL, Verdict.INCONCLUSIVE: CellState.INCONCLUSIVE}


def group_of(cell: SweepCell) -> str:
    """Return what cells share that can run on one opened model."""
    return "|".join(str(part) for part in (cell.target, cell.versus, cell.dtype, cell.attention, cell.cache))


def run_cell(payload: dict[str, Any]) -> dict[str, Any]:
    """Audit a cell and return its result as plain data. The result is on the disk before.

    Any exception of the cell becomes its result ERROR. What is left is a place that cannot be written, which ends the
    sweep: the value says why.
    """
    cell = msgspec.convert(payload["cell"], SweepCell)
    spec = msgspec.convert(payload["spec"], SweepSpec)
    directory = SweepDirectory(payload["directory"])
    began = time.monotonic()
    try:
        with directory.cell(cell.id) as place:
            result = _result(cell, spec, payload["alpha"], place)
    except Exception as error:  # noqa: BLE001  # one cell's failure is that cell's outcome
        if (why := _why_stop(error)) is not None:
            return {"stop": why}
        _close()
        said = next(iter(str(error).splitlines()), "")
        text = said if isinstance(error, KvdriftError) else f"{type(error).__name__}: {said}"
        result = CellResult(id=cell.id, state=CellState.ERROR, reasons=(text,))
    result = msgspec.structs.replace(result, seconds=round(time.monotonic() - began, 3))
    try:
        directory.write_result(result)
    except OSError as error:
        if (why := _why_stop(error)) is not None:
            return {"stop": why}
        raise
    done: dict[str, Any] = msgspec.to_builtins(result)
    return done


def _why_stop(error: BaseException | None) -> str | None:
    """Return why no cell can be kept any more: a full disk, a place that cannot be written; None if one can."""
    while error is not None:
        if isinstance(error, StoreError):
            return str(error)
        if isinstance(error, OSError) and error.errno in _FULL:
            return _NO_SPACE
        error = error.__cause__ or error.__context__
    return None


def _result(cell: SweepCell, spec: SweepSpec, alpha: float, place: Path) -> CellResult:
    given = spec.prompts.get(cell.prompt) if cell.prompt is not None else None
    prompts: Prompts | None = None if given is None or cell.prompt is None else {cell.prompt: given}
    if cell.versus is not None:
        compared: Any = compare(cell.target, cell.versus, out=place, prompts=prompts, span=spec.audit.span)
        return _of_view(cell, compared.view, compared.verdict)
    plan = plan_of(spec, cell.lengths, cell.seed, alpha)
    opened = _open(cell, plan)
    audit = audit_engine(opened.engine, plan, prompts, opened.encode, out=place, scenarios=cell.scenario)
    rows = audit.view["scenarios"]
    asked = [row for row in rows if row["name"] in cell.scenario.split(",")]
    if asked and not any(row["applicable"] for row in asked):
        reasons = tuple(reason for row in asked for reason in row["reasons"])
        return CellResult(id=cell.id, state=CellState.NOT_APPLICABLE, reasons=reasons, report=_page(cell, "html"))
    return _of_view(cell, audit.view, audit.verdict)


def _of_view(cell: SweepCell, view: dict[str, Any], verdict: Verdict) -> CellResult:
    first = view.get("first_failure")
    cause = view.get("diagnosis") or view.get("cause")
    return CellResult(
        id=cell.id,
        state=_STATES.get(verdict, CellState.PASS),
        verdict=str(verdict),
        first_failure=None if not first else first["text"],
        cause=None if not cause else cause.get("cause") or cause.get("name"),
        reasons=tuple(str(item) for item in view["reasons"]),
        report=_page(cell, "md" if cell.versus is not None else "html"),
    )


def _page(cell: SweepCell, suffix: str) -> str:
    return f"cells/{cell.id}/report.{suffix}"


def _open(cell: SweepCell, plan: Any) -> Any:
    """Return the model of a cell, open; that of the last cell if it is the same."""
    key = group_of(cell)
    if _held.get("key") == key:
        return _held["opened"]
    _close()
    kind, place = find_engine(None if cell.target == "default" else cell.target)
    require_place(place)
    named = {
        "hf": {"dtype": cell.dtype, "attn": cell.attention, "cache": cell.cache},
        "mlx": {"cache": cell.cache},
        "llamacpp": {"kv_type": cell.cache, "flash_attn": cell.attention},
    }[kind.name]
    stack = ExitStack()
    options = {name: value for name, value in named.items() if value is not None}
    opened = stack.enter_context(kind.open(place, plan, Silent(), options))
    _held.update(key=key, opened=opened, stack=stack)
    return opened


def _close() -> None:
    stack = _held.pop("stack", None)
    _held.clear()
    if stack is not None:
        stack.close()


__all__ = ["group_of", "run_cell"]
