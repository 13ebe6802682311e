"""`kvdrift-bench servers`: alarms on a real llama-server that is clean, and faults of decode that are found."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Literal, cast

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, measuring


def servers(
    model: Annotated[
        list[str] | None, typer.Option(help="tiny, or smollm2: about 70 s of a core an audit; both if not given.")
    ] = None,
    answers: Annotated[int, typer.Option(min=1, help="Answers of clean servers to record of each, at least.")] = 6000,
    draws: Annotated[int, typer.Option(min=0, help="Clean audits to draw from those of each.")] = 200,
    pool: Annotated[
        Path | None,
        typer.Option(help="A folder to keep recorded audits in: they are not run again, so that the command resumes."),
    ] = None,
    markdown: Markdown = None,
) -> None:
    """Audit a real llama-server: clean at several settings, live and drawn from recorded answers, and with faults."""
    left = "nothing was kept; --pool FOLDER keeps each audit" if pool is None else f"{pool} holds what was recorded"
    with errors_as_messages(left):
        from kvdrift.errors import UsageError
        from kvdrift_bench.figures.document import SERVERS
        from kvdrift_bench.figures.server_figures import measure
        from kvdrift_bench.run.server_pool import Pool

        kinds = list(dict.fromkeys(model or ["tiny", "smollm2"]))
        if unknown := [kind for kind in kinds if kind not in ("tiny", "smollm2")]:
            raise UsageError(f"unknown model {unknown[0]!r}; --model takes tiny or smollm2")
        with measuring() as progress:
            text = measure(cast(list[Literal["tiny", "smollm2"]], kinds), answers, draws, Pool(pool), progress)
        words = ["servers", *(word for kind in model or [] for word in ("--model", kind))]
        words += ["--answers", str(answers), "--draws", str(draws)]
        text = f"`{shlex.join(['kvdrift-bench', *words])}`\n\n{text}"
        if markdown is not None:
            SERVERS.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["servers"]
