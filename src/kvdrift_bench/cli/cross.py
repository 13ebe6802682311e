"""`kvdrift-bench cross`: every architecture that transformers and mlx-lm both have, one against the other."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import measuring, what_is_left


def cross(
    model_type: Annotated[list[str] | None, typer.Option(help="Architecture; repeatable; default: all.")] = None,
    jobs: Annotated[int | None, typer.Option(min=1, help="Processes at a time; default: one a core.")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="Keep finished rows in this file, and go on with what it holds.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the page to this file.")] = None,
) -> None:
    """Compare each architecture of transformers with itself in mlx-lm, on the same random weights."""
    with errors_as_messages(what_is_left(None)):
        from importlib.metadata import version

        from kvdrift.report.run_directory import write_file
        from kvdrift_bench.run.cross_runs import choose_kinds, cross_page, run_cross

        kinds = choose_kinds(model_type or ())
        versions = ", ".join(f"{name} {version(name)}" for name in ("kvdrift", "transformers", "mlx-lm", "mlx"))
        found = []
        with measuring() as progress:
            progress.start(len(kinds))
            for row in run_cross(kinds, versions, jobs, rows):
                progress.step(row.kind)
                found.append(row)
        words = [word for name in model_type or () for word in ("--model-type", name)]
        text = cross_page(found, shlex.join(["kvdrift-bench", "cross", *words]), versions)
        if markdown is not None:
            write_file(markdown, text, "--markdown")
        typer.echo(text, nl=False)


__all__ = ["cross"]
