"""`kvdrift diff`: what separates two runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import existing_run
from kvdrift.cli.output import print_lines, print_result

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    kvdrift diff runs/main runs/branch\n\n    kvdrift diff runs/main runs/branch --json\n\n"
    "Exit codes: 0 B is no worse than A, 1 worse, 2 usage, 5 no readable run."
)
def diff(
    run_a: Annotated[Path, typer.Argument(help="The directory of the earlier run.")],
    run_b: Annotated[Path, typer.Argument(help="The directory of the later run.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Compare two runs: what got worse beyond noise, what appeared, what vanished. There is no tolerance to set."""
    with errors_as_messages():
        from kvdrift.pipeline.diff import diff_runs

        found = diff_runs(existing_run(run_a), existing_run(run_b))
        if as_json:
            print_result(found.to_json())
        else:
            print_lines(found.lines())
    raise typer.Exit(found.exit_code)
