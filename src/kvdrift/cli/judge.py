"""`kvdrift judge`: saved traces, judged without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import SCOPE, AsJson, AsMarkdown, existing_run
from kvdrift.cli.output import EXIT_CODES, command_line, page_and_panel, print_result
from kvdrift.cli.progress import terminal_progress

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    kvdrift judge kvdrift-runs/20260207-101500\n\n"
    f"    kvdrift judge engine-traces --format greta --html report.html\n\n{EXIT_CODES}"
)
def judge(
    run_dir: Annotated[Path, typer.Argument(help="A run that kept its traces, or a directory of trace files.")],
    alpha: Annotated[float | None, typer.Option(help="Judge with another alpha.")] = None,
    scope: Annotated[list[str] | None, typer.Option(help=SCOPE)] = None,
    kind: Annotated[
        str, typer.Option("--format", help="auto, kvdrift, transformers-debug, npz, sglang or greta.")
    ] = "auto",
    as_json: AsJson = False,
    markdown: AsMarkdown = False,
    html: Annotated[Path | None, typer.Option(help="Write the report with its pictures to this file as well.")] = None,
) -> None:
    """Judge saved traces without the model: those of an audit, or those that another program wrote."""
    with errors_as_messages():
        from kvdrift.pipeline.judge import judge_directory

        with terminal_progress() as progress:
            result, recognised = judge_directory(
                existing_run(run_dir), kind, alpha=alpha, scope=scope or (), progress=progress, command=command_line()
            )
        if recognised is not None:
            typer.echo(f"kvdrift: {run_dir} holds {recognised}", err=True)
        if html is not None:
            from kvdrift.report.run_directory import write_file

            write_file(html, result.to_html(), "--html")
        if as_json or markdown:
            print_result(result.to_json() if as_json else result.to_markdown())
        else:
            print_result(page_and_panel(result.to_markdown(), result.view, _place(run_dir)))
    raise typer.Exit(result.exit_code)


def _place(run_dir: Path) -> Path | None:
    """Where a report lies: in the directory of an audit, and nowhere beside the traces of another program."""
    return run_dir if (run_dir / "report.md").is_file() else None
