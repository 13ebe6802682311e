"""`kvdrift-bench promises`: whether faults a little above a stated minimum are found, whatever their shape."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import UsageError
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left


def promises(
    place: Annotated[
        list[str] | None, typer.Option(help="Sites at which faults are planted; repeatable; default: all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    draws: Annotated[int, typer.Option(min=1, help="Faults of each shape at each place, on prompts of their own.")] = 2,
    markdown: Markdown = None,
) -> None:
    """Plant faults of 1.5 times the stated minimum, in five shapes, and count those found at their place."""
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import PROMISES
        from kvdrift_bench.run.promise_runs import PLACES, SHAPES, run_promises, table

        places = tuple(place or PLACES)
        if wrong := [name for name in places if name not in PLACES]:
            raise UsageError(f"unknown place {wrong[0]!r}; use --place with one of {', '.join(PLACES)} (places=...)")
        if dtype not in ("bfloat16", "float16"):
            raise UsageError(f"unknown dtype {dtype!r}; use --dtype bfloat16 or float16 (dtype=...)")
        with measuring():
            cells = list(run_promises(places, tuple(SHAPES), draws, dtype))
        words = [word for name in place or () for word in ("--place", name)]
        command = shlex.join(["kvdrift-bench", "promises", *words, "--dtype", dtype, "--draws", str(draws)])
        found, trials = sum(cell.found for cell in cells), sum(cell.trials for cell in cells)
        text = f"`{command}`: {found} of {trials} found at their place.\n\n{table(cells)}"
        if markdown is not None:
            PROMISES.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["promises"]
