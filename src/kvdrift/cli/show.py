"""`kvdrift show`: the report of a run, as it was written."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import AsJson, AsMarkdown, existing_run
from kvdrift.cli.output import page_and_panel, print_result
from kvdrift.errors import TraceError

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    kvdrift show kvdrift-runs/20260207-101500 | less\n\n"
    "    kvdrift show kvdrift-runs/20260207-101500 --markdown\n\n"
    "Exit codes: 0 printed, 2 usage, 5 no readable report."
)
def show(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run.")],
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
) -> None:
    """Print the report of a run, and its verdict in a panel."""
    with errors_as_messages():
        from kvdrift.pipeline.diff import read_view

        view = read_view(existing_run(run_dir))
        path = run_dir / ("report.json" if as_json else "report.md")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"cannot read {path}: {error}; is {run_dir} the directory of a finished run?") from error
        print_result(text if as_json or markdown else page_and_panel(text, view, run_dir))
