"""`kvdrift zoo`: every registered architecture as a tiny random model, audited."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import AsJson
from kvdrift.cli.output import print_result

if TYPE_CHECKING:
    from kvdrift.report.schema.others import ZooRowView, ZooView

app = typer.Typer()
_VERSIONS = {"hf": ("kvdrift", "transformers", "torch"), "mlx": ("kvdrift", "mlx-lm", "mlx")}


@app.command(
    epilog="Examples:\n\n    kvdrift zoo --model-type mistral --scenario all\n\n"
    "    kvdrift zoo --rows zoo.jsonl --markdown zoo.md\n\n"
    "    kvdrift zoo --engine mlx --model-type qwen3_next\n\n"
    "Exit codes: 0 every type that applies passes, 1 a type is a MISMATCH in plain decode or a scenario, 2 usage, "
    "3 the engine is not installed, 5 the file of rows cannot be read, 6 a type has no verdict, 130 interrupted."
)
def zoo(
    model_type: Annotated[
        list[str] | None, typer.Option(help="Type to audit; repeatable; default: all that transformers registers.")
    ] = None,
    scenario: Annotated[
        list[str] | None, typer.Option(help="Scenarios beside plain decode; repeatable; `all` for all that apply.")
    ] = None,
    engine: Annotated[str, typer.Option(help="Whose types: hf (transformers) or mlx (mlx-lm).")] = "hf",
    rows: Annotated[
        Path | None,
        typer.Option(help="Keep finished rows in this file, one JSON a line, and go on with what it holds."),
    ] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one a core.")] = None,
    type_timeout: Annotated[float, typer.Option(help="Seconds that a type may take; then it is an ERROR.")] = 600.0,
    backend: Annotated[str, typer.Option(help="local (processes of this machine) or ray.")] = "local",
    ray_address: Annotated[
        str | None, typer.Option(help="Address of a Ray cluster; default: Ray's own choice.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as a Markdown page to this file.")] = None,
    as_json: AsJson = False,
) -> None:
    """Build a tiny random model of each causal language model that transformers or mlx-lm has, and audit it."""
    with errors_as_messages(left="finished rows are kept in the file of --rows; the same command goes on"):
        from kvdrift.cli.progress import terminal_progress
        from kvdrift.cli.sweep import backend_of
        from kvdrift.errors import UsageError
        from kvdrift.report.schema import view_to_text
        from kvdrift.scenarios.catalogue import choose_scenarios
        from kvdrift.sweep.backend import Limits
        from kvdrift.zoo.drive import choose_types, run_zoo

        if type_timeout <= 0:
            raise UsageError(f"--type-timeout is {type_timeout:g}, and must be above 0")
        names = [each.name for each in choose_scenarios(",".join(scenario) if scenario else None)[1]]
        types = choose_types(model_type or (), engine)
        limits = Limits(jobs=jobs, timeout=type_timeout, retries=0)
        with terminal_progress() as progress:
            found = run_zoo(types, names, backend_of(backend, ray_address), limits, rows, progress, engine)
        view = _view(found, names, engine)
        if markdown is not None:
            from kvdrift.report.run_directory import write_file
            from kvdrift.zoo.table import page

            words = [] if engine == "hf" else ["--engine", engine]
            words += [word for name in model_type or () for word in ("--model-type", name)]
            words += [word for name in scenario or () for word in ("--scenario", name)]
            write_file(
                markdown, page(found, shlex.join(["kvdrift", "zoo", *words]), view.versions, engine), "--markdown"
            )
        print_result(view_to_text(view) if as_json else _table(view))
    raise typer.Exit(view.exit_code)


def _view(rows: list[ZooRowView], scenarios: list[str], engine: str) -> ZooView:
    from collections import Counter
    from importlib.metadata import version

    from kvdrift.report.schema.others import ZooView
    from kvdrift.report.view import SCHEMA_VERSION

    states = [state for row in rows for state in (row.state, *row.verdicts.values())]
    exit_code = 1 if "MISMATCH" in states else 6 if {"INCONCLUSIVE", "ERROR"} & set(states) else 0
    return ZooView(
        schema_version=SCHEMA_VERSION,
        kind="zoo",
        versions={name: version(name) for name in _VERSIONS[engine]},
        scenarios=scenarios,
        counts=dict(Counter(row.state for row in rows)),
        exit_code=exit_code,
        rows=rows,
    )


def _table(view: ZooView) -> str:
    """Return the rows as a table, with their counts at its end; ASCII where stdout is not a terminal."""
    from rich import box
    from rich.table import Table

    from kvdrift.cli.screen import Screen
    from kvdrift.zoo.table import counts, others

    screen = Screen.of_stdout()
    table: Any = Table(box=box.ROUNDED if screen.unicode else box.ASCII)
    for name in ("type", "plain decode", "other scenarios", "first failure or reason"):
        table.add_column(name, overflow="fold")
    for row in view.rows:
        cells = (row.type, row.state, others(row), row.first_failure or row.reason or "")
        table.add_row(*(screen.text(cell) for cell in cells))
    return screen.render(table) + screen.lines([f"{len(view.rows)} types: {counts(view.rows)}"])
