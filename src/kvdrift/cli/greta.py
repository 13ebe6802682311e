"""The script of GRETA traces: the report as their own analyser names it, FILE.md, and FILE.tsv with every tensor."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import SCOPE
from kvdrift.cli.progress import terminal_progress
from kvdrift.pipeline.greta import SCRIPT, analyse_traces

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(
    epilog="Example:\n\n    analyze_b3_66_prefill_decode_drift.py -i b3_66/traces -m both -o B3_66_REPORT.md\n\n"
    "Exit codes: 0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 5 bad trace, 6 INCONCLUSIVE."
)
def analyse(
    traces_dir: Annotated[Path, typer.Option("--traces-dir", "-i", help="The directory of GRETA StageTrace files.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The report, FILE.md; FILE.tsv is written beside it.")],
    mode: Annotated[str, typer.Option("--mode", "-m", help="as_designed, kv_aligned or both.")] = "both",
    scope: Annotated[list[str] | None, typer.Option(help=SCOPE)] = None,
) -> None:
    """Judge prefill against decode in GRETA traces: is the drift structural, or a real mismatch?"""
    with errors_as_messages("the report was not written"), terminal_progress() as progress:
        command = shlex.join([SCRIPT, *sys.argv[1:]])
        result = analyse_traces(traces_dir, output, mode, scope=scope or (), command=command, progress=progress)
    scoped = f" ({result.decision.scope})" if result.decision.scope else ""
    typer.echo(f"{result.verdict}{scoped}: {result.view['hypotheses']['conclusion']}")
    typer.echo(f"report: {output}")
    raise typer.Exit(result.exit_code)


def main() -> None:
    """Entry point of the script."""
    app()
