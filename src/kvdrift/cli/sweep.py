"""`kvdrift sweep`: a matrix of audits, and how far it has come."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.output import print_lines, print_result
from kvdrift.errors import UsageError

if TYPE_CHECKING:
    from kvdrift.report.schema.others import SweepView
    from kvdrift.sweep.store import SweepDirectory

app = typer.Typer()
_STATUS = "status"


@app.command(
    epilog="Examples:\n\n    kvdrift sweep sweep.toml --out nightly --junit sweep.xml\n\n"
    "    kvdrift sweep status nightly\n\n    kvdrift sweep --resume nightly --cell-timeout 600\n\n"
    "Exit codes: 0 every cell that applies passes, 1 a cell is a MISMATCH, 2 usage or no space left, "
    "5 not the directory of a sweep, 6 incomplete or inconclusive, 130 interrupted; `status`: 0."
)
def sweep(
    spec: Annotated[str | None, typer.Argument(metavar="SPEC.toml", help="The spec; or the word `status`.")] = None,
    directory: Annotated[
        str | None, typer.Argument(metavar="DIR", help="After `status`: the sweep to look at.")
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="DIR", help="Directory of the sweep, or s3://BUCKET/PREFIX; default: the spec's name."),
    ] = None,
    resume: Annotated[
        str | None, typer.Option(metavar="DIR", help="Go on with the sweep in DIR: what has no verdict runs.")
    ] = None,
    backend: Annotated[str, typer.Option(help="local (processes of this machine) or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: Ray's own choice.")
    ] = None,
    jobs: Annotated[int | None, typer.Option(help="Cells at a time; default: one a core, as memory allows.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory for all cells, such as 16 GB; default: what is free.")
    ] = None,
    cell_timeout: Annotated[
        float | None, typer.Option(help="Seconds that a cell may take; then it is an ERROR.")
    ] = None,
    retries: Annotated[int, typer.Option(help="How often a cell whose worker died is begun again.")] = 1,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print summary.json and nothing else.")] = False,
) -> None:
    """Audit a matrix: models, dtypes, kernels, caches, scenarios, prompts, lengths, seeds and engines."""
    with errors_as_messages(left="finished cells are kept; go on with --resume"):
        from kvdrift.report.schema import view_to_text
        from kvdrift.sweep.backend import Limits
        from kvdrift.sweep.spec import parse_memory

        if spec == _STATUS:
            if directory is None:
                raise UsageError("name the directory: kvdrift sweep status DIR")
            if as_json:
                print_result(view_to_text(_summary(directory)))
            else:
                print_lines(_status(directory))
            raise typer.Exit
        if directory is not None:
            raise UsageError(f"{str(directory)!r} is one argument too many; kvdrift sweep takes one SPEC.toml")
        limits = Limits(
            jobs=jobs,
            memory=None if memory is None else parse_memory(memory),
            timeout=cell_timeout,
            retries=retries,
        )
        view, place = _run(spec, out, resume, backend_of(backend, ray_address), limits)
        if junit is not None:
            from kvdrift.report.run_directory import write_file
            from kvdrift.sweep.page import junit as to_junit

            write_file(junit, to_junit(view), "--junit")
        print_result(view_to_text(view) if as_json else _table(view, place))
    raise typer.Exit(view.exit_code)


def _run(spec: str | None, out: str | None, resume: str | None, backend: Any, limits: Any) -> tuple[SweepView, str]:
    from kvdrift.sweep.drive import declare, run_sweep
    from kvdrift.sweep.spec import read_spec
    from kvdrift.sweep.store import SweepDirectory

    if (spec is None) == (resume is None):
        raise UsageError("name a spec (kvdrift sweep SPEC.toml) or a sweep to go on with (--resume DIR), one of them")
    if limits.jobs is not None and limits.jobs < 1:
        raise UsageError(f"--jobs is {limits.jobs}, and at least 1 cell must run")
    if limits.timeout is not None and limits.timeout <= 0:
        raise UsageError(f"--cell-timeout is {limits.timeout:g}, and must be above 0")
    if resume is not None:
        place = SweepDirectory(resume)
        place.read()
    else:
        path = Path(str(spec))
        place = declare(read_spec(path), out if out is not None else path.stem)
    with _watching() as watcher:
        return run_sweep(place, backend, limits, watcher), str(place)


def backend_of(name: str, ray_address: str | None) -> Any:
    """Return the backend of a name.

    Raises:
        UsageError: there is none of that name, or the address of a Ray cluster is given to another one.
    """
    if name == "ray":
        from kvdrift.sweep.on_ray import RayBackend

        return RayBackend(ray_address)
    if name != "local":
        raise UsageError(f"unknown backend {name!r}; --backend takes local or ray")
    if ray_address is not None:
        raise UsageError("--ray-address is for --backend ray; add it, or leave the address out")
    from kvdrift.sweep.local import LocalBackend

    return LocalBackend()


class _Watcher:
    """Draws a line a running cell, the counts and the time left; draws nothing where stderr is not a terminal."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._running: dict[str, float] = {}
        self._counts: dict[str, int] = {}
        self._finished = self._total = self._ended = 0
        self._began = time.monotonic()

    def begin(self, finished: int, total: int) -> None:
        """Hear how many cells there are."""
        self._finished, self._total = finished, total
        self._draw()

    def started(self, cell: str, worker: str) -> None:
        """Draw the line of a cell."""
        self._running[cell] = time.monotonic()
        self._draw()

    def ended(self, cell: str, state: Any) -> None:
        """Take the line of a cell away, and count it."""
        self._running.pop(cell, None)
        self._counts[str(state)] = self._counts.get(str(state), 0) + 1
        self._finished += 1
        self._ended += 1
        self._draw()

    def _draw(self) -> None:
        if self._live is None:
            return
        now = time.monotonic()
        left = (now - self._began) / self._ended * (self._total - self._finished) if self._ended else None
        counts = ", ".join(f"{n} {state}" for state, n in self._counts.items())
        lines = [f"  {cell}  {now - since:.0f} s" for cell, since in self._running.items()]
        lines.append(
            f"{self._finished} of {self._total} cells{'; ' if counts else ''}{counts}"
            f"{'' if left is None else f'; about {left:.0f} s left'}"
        )
        from rich.text import Text

        self._live.update(Text("\n".join(lines)))


def _watching() -> Any:
    from contextlib import contextmanager

    if not sys.stderr.isatty():
        return nullcontext(_Watcher(None))

    @contextmanager
    def drawn() -> Any:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), transient=True, redirect_stdout=False, redirect_stderr=False) as live:
            yield _Watcher(live)

    return drawn()


def _table(view: SweepView, place: str) -> str:
    """Return the cells as a table, with the verdict at its end; ASCII where stdout is not a terminal."""
    from rich import box
    from rich.table import Table

    from kvdrift.cli.screen import Screen
    from kvdrift.sweep.page import value_of, varying

    screen = Screen.of_stdout()
    axes = varying(view)
    table = Table(box=box.ROUNDED if screen.unicode else box.ASCII)
    for name in (*axes, "scenario", "state", "first failure or reason"):
        table.add_column(name, overflow="fold")
    for cell in view.cells:
        why = cell.first_failure or (cell.reasons[0] if cell.reasons and cell.state != "PASS" else "")
        values = [value_of(cell, axis) for axis in axes]
        table.add_row(*(screen.text(text) for text in (*values, cell.scenario, cell.state, why)))
    counts = ", ".join(f"{n} {state}" for state, n in view.counts.items() if n)
    lines = [f"{view.verdict}: {counts}", *view.reasons, f"report: {place}/report.html"]
    return screen.render(table) + screen.lines(lines)


def _summary(path: str) -> SweepView:
    from kvdrift.sweep.store import SweepDirectory
    from kvdrift.sweep.summary import build_summary

    directory: SweepDirectory = SweepDirectory(path)
    return build_summary(directory.read(), directory.results())


def _status(path: str) -> list[str]:
    from kvdrift.sweep.store import SweepDirectory

    view, directory = _summary(path), SweepDirectory(path)
    progress, driven = directory.read_progress(), directory.is_driven()
    counts = ", ".join(f"{n} {state}" for state, n in view.counts.items() if n)
    lines = [f"{view.name}: {len(view.cells)} cells: {counts}"]
    missing = view.counts["MISSING"]
    if driven:
        lines += [f"  {cell}  since {item['since']}, {item['worker']}" for cell, item in progress["running"].items()]
        if missing and progress["seconds"]:
            lines.append(f"about {missing * progress['seconds']:.0f} s left")
    elif missing or view.counts["ERROR"]:
        lines.append(f"nothing runs; go on with kvdrift sweep --resume {path}")
    return lines
