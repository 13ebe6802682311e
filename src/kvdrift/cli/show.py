"""`kvdrift show`: the report of a run, as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import AsJson, existing_run
from kvdrift.cli.output import print_result
from kvdrift.errors import TraceError

app = typer.Typer()


@app.command(
    epilog="Example:\n\n    kvdrift show kvdrift-runs/20260207-101500 | less\n\n"
    "Exit codes: 0 printed, 2 usage, 5 no readable report."
)
def show(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run.")],
    as_json: AsJson = False,
) -> None:
    """Print the report of a run."""
    with errors_as_messages():
        path = existing_run(run_dir) / ("report.json" if as_json else "report.md")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"cannot read {path}: {error}; is {run_dir} the directory of a finished run?") from error
        print_result(text)
