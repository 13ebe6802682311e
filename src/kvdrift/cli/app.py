"""The command line: reads options, calls the library, prints the result. To add a subcommand, add a file like `show.py`
and a line to `SUBCOMMANDS`; docs/adding/subcommand.md does so."""

from __future__ import annotations

import gc
from typing import Annotated

import typer

from kvdrift import __version__
from kvdrift.cli import audit, compare, determinism, diff, gate, judge, scenarios, schema, show, sweep, trace, zoo
from kvdrift.cli.output import EXIT_CODES, prepare_stdout

# In the order of the help.
SUBCOMMANDS = (
    audit.app,
    judge.app,
    show.app,
    compare.app,
    diff.app,
    gate.app,
    sweep.app,
    zoo.app,
    determinism.app,
    trace.app,
    scenarios.app,
    schema.app,
)

app = typer.Typer(
    name="kvdrift",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Is the difference between prefill and cached decode rounding, or a bug?",
    epilog=f"Example: `kvdrift audit`\n\n{EXIT_CODES}",
)
for subcommand in SUBCOMMANDS:
    app.add_typer(subcommand)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"kvdrift {__version__}")
        raise typer.Exit


def main() -> None:
    """Entry point of the console script."""
    prepare_stdout()
    # Traces are hundreds of thousands of small objects without circles: collecting them over and over finds nothing.
    gc.freeze()
    gc.set_threshold(1_000_000, 20, 20)
    app()
