"""`kvdrift schema`: the JSON Schema of what a verb prints with --json."""

from __future__ import annotations

from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import AsJson
from kvdrift.cli.output import print_lines, print_result
from kvdrift.errors import UsageError

app = typer.Typer()


@app.command(epilog="Examples:\n\n    kvdrift schema\n\n    kvdrift schema report\n\nExit codes: 0 printed, 2 usage.")
def schema(
    name: Annotated[str | None, typer.Argument(help="Which one; nothing: list them.")] = None, as_json: AsJson = False
) -> None:
    """Print the JSON Schema of what a verb prints with `--json`."""
    with errors_as_messages():
        from kvdrift.report.schema import SCHEMAS, list_schemas, read_schema

        if name is None and as_json:
            print_result(list_schemas())
            return
        if name is None:
            print_lines(f"{key:12}{verbs}" for key, (_, verbs) in SCHEMAS.items())
            return
        if name not in SCHEMAS:
            raise UsageError(f"there is no schema {name!r}; there are {', '.join(SCHEMAS)}")
        print_result(read_schema(name))
