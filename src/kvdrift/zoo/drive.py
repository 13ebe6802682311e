"""Runs the types through a backend. Each finished row is a line of a file, so that a run that was cut off goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import msgspec

from kvdrift.errors import EngineUnavailable, TraceError, UsageError
from kvdrift.report.schema.others import ZooRowView
from kvdrift.sweep.backend import Backend, Job, Limits
from kvdrift.vocabulary.progress import Progress
from kvdrift.zoo.build import registered
from kvdrift.zoo.build_mlx import registered_mlx
from kvdrift.zoo.rows import AUDIT_TYPE, made_with, without_verdict

_REGISTRIES: Mapping[str, tuple[str, Callable[[], Collection[str]]]] = {
    "hf": ("transformers", registered),
    "mlx": ("mlx-lm", registered_mlx),
}


def choose_types(names: Sequence[str], engine: str = "hf") -> list[str]:
    """Return the types to audit: those named, or all that are registered.

    Raises:
        EngineUnavailable: the engine is not installed.
        UsageError: a name is not registered, or the engine has no registry.
    """
    if engine not in _REGISTRIES:
        raise UsageError(f"--engine is {engine!r}; the zoo knows the types of {', '.join(_REGISTRIES)}")
    package, registry = _REGISTRIES[engine]
    try:
        known = registry()
    except ImportError as error:
        raise EngineUnavailable(
            f"the zoo needs {package}, which is not installed; pip install 'kvdrift[{engine}]'"
        ) from error
    if unknown := [name for name in names if name not in known]:
        raise UsageError(
            f"{unknown[0]!r} is not a causal language model that the installed {package} has registered; "
            f"--model-type takes one of {', '.join(sorted(known))}"
        )
    return list(dict.fromkeys(names)) or sorted(known)


def read_rows(path: Path) -> dict[str, ZooRowView]:
    """Return the rows that a file holds, by type; none where there is no file. A last line that was cut off is dropped.

    Raises:
        TraceError: a line is not a row.
    """
    if not path.exists():
        return {}
    *lines, rest = path.read_bytes().split(b"\n")
    rows = {}
    for n, line in enumerate(lines, 1):
        try:
            row = msgspec.json.decode(line, type=ZooRowView)
        except msgspec.MsgspecError as error:
            raise TraceError(
                f"line {n} of {path} is not a row of the zoo ({error}); name another file with --rows"
            ) from error
        rows[row.type] = row
    if rest:  # its writer was killed in the middle of a line
        path.write_bytes(b"".join(line + b"\n" for line in lines))
    return rows


def _of_these(rows: Mapping[str, ZooRowView], scenarios: Sequence[str], engine: str) -> dict[str, ZooRowView]:
    """The rows that the same call would make again: of these scenarios, and of the versions that are installed."""
    made = {"scenarios": list(scenarios), **made_with(engine)}
    return {kind: row for kind, row in rows.items() if all(getattr(row, name) == value for name, value in made.items())}


def run_zoo(
    types: Sequence[str],
    scenarios: Sequence[str],
    backend: Backend,
    limits: Limits,
    rows: Path | None,
    progress: Progress,
    engine: str = "hf",
) -> list[ZooRowView]:
    """Audit the types that `rows` does not hold yet; return the rows of all of them, in the order given.

    A row is in the file before the next one is waited for.
    """
    known = {} if rows is None else _of_these(read_rows(rows), scenarios, engine)
    asked = {"scenarios": list(scenarios), "engine": engine}
    jobs = [
        Job(id=kind, function=AUDIT_TYPE, payload={**asked, "type": kind}, group="zoo")
        for kind in types
        if kind not in known
    ]
    progress.start(len(jobs))
    for outcome in backend.run(jobs, limits, lambda job, worker: progress.step(f"audit {job}")):
        if outcome.value is None:
            row = without_verdict(outcome.id, scenarios, "ERROR", outcome.error, engine)
        else:
            row = msgspec.convert(outcome.value, ZooRowView)
        known[row.type] = row
        if rows is not None:
            with rows.open("ab") as file:
                file.write(msgspec.json.encode(row) + b"\n")
    return [known[kind] for kind in types]
