"""`kvdrift-bench scenarios`: what each scenario finds, and what no other one does."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import UsageError
from kvdrift_bench.cli.console import Markdown, Out, measuring, what_is_left

if TYPE_CHECKING:
    from kvdrift_bench.figures.scenario_figures import Matrix

_NONE = "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixOptions:
    """What `kvdrift-bench scenarios` is asked to do; None is everything, an empty tuple nothing."""

    faults: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    out: Path | None = None
    markdown: Path | None = None
    json: Path | None = None

    @property
    def command(self) -> str:
        """The command that gives these figures, without the paths of this machine."""
        words = ["kvdrift-bench", "scenarios"]
        for option, names in (("--faults", self.faults), ("--model", self.models)):
            words += [] if names is None else [option, ",".join(names) or _NONE]
        return shlex.join(words)


def bench_scenarios(options: MatrixOptions, say: Callable[[str], None], progress: Any = None) -> Matrix:
    """Run as asked, write the files that were asked for, and return the figures.

    What is in `options.out` already is not run again.
    """
    import msgspec

    from kvdrift_bench.figures.document import SCENARIOS, machine_facts, write_json
    from kvdrift_bench.figures.render import render_scenarios
    from kvdrift_bench.figures.scenario_figures import build_matrix, finders
    from kvdrift_bench.run.records import RecordFile, of_keys
    from kvdrift_bench.run.scenario_runs import MatrixRow, choose_runs, run_matrix

    runs = choose_runs(options.faults, options.models)
    if not runs:
        raise UsageError("nothing is left to run; name a fault with --faults or an architecture with --model")
    file = RecordFile(options.out, MatrixRow)
    for row in run_matrix(runs, file, progress):
        say(f"{row.model}: {row.name}: {row.error or ', '.join(finders(row, None)) or 'no mismatch'}")
    matrix = build_matrix(of_keys(file.records, [run.row.key for run in runs]))
    if options.markdown is not None:
        SCENARIOS.write(options.markdown, render_scenarios(matrix, options.command, machine_facts()))
    if options.json is not None:
        write_json(options.json, options.command, machine_facts(), {"rows": msgspec.to_builtins(matrix.rows)})
    return matrix


def scenarios(
    faults: Annotated[
        str | None, typer.Option(help="Names of faults that need a scenario, with commas; none; default: all of them.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Tiny architectures to run clean, with commas; none; default: all of them.")
    ] = None,
    out: Out = None,
    markdown: Markdown = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Every verdict of every scenario, as JSON.")] = None,
) -> None:
    """Plant every fault that needs a scenario and run all scenarios: which find it, and does one alone."""
    with errors_as_messages(what_is_left(out)):
        options = MatrixOptions(faults=_names(faults), models=_names(model), out=out, markdown=markdown, json=json_file)
        typer.echo(_run(options), nl=False)


def _run(options: MatrixOptions) -> str:
    """Run with progress on stderr, and return the figures as Markdown."""
    from kvdrift_bench.figures.document import machine_facts
    from kvdrift_bench.figures.render import render_scenarios

    with measuring() as progress:
        matrix = bench_scenarios(options, lambda text: typer.echo(text, err=True), progress)
    return render_scenarios(matrix, options.command, machine_facts())


def _names(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    return () if text.strip() == _NONE else tuple(part.strip() for part in text.split(",") if part.strip())


__all__ = ["MatrixOptions", "bench_scenarios", "scenarios"]
