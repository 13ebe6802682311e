"""`kvdrift trace check`: what a directory of traces holds, before it is judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import existing_run
from kvdrift.cli.output import print_lines, print_result
from kvdrift.cli.progress import terminal_progress

app = typer.Typer()
group = typer.Typer(name="trace", no_args_is_help=True, help="Look at trace files without judging them.")
app.add_typer(group)


@group.callback()
def _group() -> None:
    """Keep `check` a command of its own, as long as it is the only one."""


@group.command(
    epilog="Example:\n\n    kvdrift trace check engine-traces\n\nExit codes: 0 printed, 2 usage, 5 no readable trace."
)
def check(
    directory: Annotated[Path, typer.Argument(help="A directory of trace files, or a run that kept its traces.")],
    kind: Annotated[
        str, typer.Option("--format", help="auto, kvdrift, transformers-debug, npz, sglang or greta.")
    ] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Say on one page what is there, what is missing and what that costs a verdict."""
    with errors_as_messages():
        from kvdrift.pipeline.trace_check import check_traces
        from kvdrift.report.inventory import inventory_json, render_inventory

        with terminal_progress() as progress:
            inventory = check_traces(existing_run(directory), kind, progress=progress)
        if as_json:
            print_result(inventory_json(inventory))
        else:
            print_lines(render_inventory(inventory).splitlines())
