"""`kvdrift-bench servers`: alarms on a real llama-server that is clean, and faults of decode that are found."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left


def servers(
    answers: Annotated[int, typer.Option(min=1, help="Answers of clean servers to record, at least.")] = 6000,
    draws: Annotated[int, typer.Option(min=0, help="Clean audits to draw from them.")] = 200,
    embedded: Annotated[
        int,
        typer.Option(min=0, help="Live clean audits of SmolLM2, minutes each; 0 leaves out its faults as well."),
    ] = 2,
    markdown: Markdown = None,
) -> None:
    """Audit a real llama-server: clean at several settings, live and drawn from recorded answers, and with faults."""
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import SERVERS
        from kvdrift_bench.figures.server_figures import measure

        with measuring():
            text = measure(answers, draws, embedded)
        words = ["servers", "--answers", str(answers), "--draws", str(draws), "--embedded", str(embedded)]
        text = f"`{shlex.join(['kvdrift-bench', *words])}`\n\n{text}"
        if markdown is not None:
            SERVERS.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["servers"]
