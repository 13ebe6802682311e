"""`kvdrift-bench promises`: whether faults a little above a stated minimum are found, whatever their shape."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import UsageError
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left


def promises(
    instrument: Annotated[
        list[str] | None, typer.Option(help="Instruments whose minima are tried; repeatable; default: all.")
    ] = None,
    place: Annotated[
        list[str] | None, typer.Option(help="With --full, sites at which faults are planted; repeatable; default: all.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float16.")] = "bfloat16",
    draws: Annotated[int, typer.Option(min=1, help="Faults of each shape at each place.")] = 20,
    full: Annotated[
        bool, typer.Option("--full", help="Also plant them in running models, whole audits each: about an hour.")
    ] = False,
    markdown: Markdown = None,
) -> None:
    """Plant faults of 1.5 times the stated minimum, in five shapes, and count those found at their place."""
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import PROMISES
        from kvdrift_bench.run.promise_records import INSTRUMENTS, run_recorded
        from kvdrift_bench.run.promise_runs import PLACES, run_promises
        from kvdrift_bench.run.promise_shapes import SHAPES, table

        instruments, places = tuple(instrument or INSTRUMENTS), tuple(place or PLACES)
        _require("instrument", instruments, INSTRUMENTS)
        _require("place", places, PLACES)
        _require("dtype", (dtype,), ("bfloat16", "float16"))
        with measuring():
            cells = list(run_recorded(instruments, draws, dtype))
            planted = list(run_promises(places, tuple(SHAPES), draws, dtype)) if full else []
        words = [word for name in instrument or () for word in ("--instrument", name)]
        words += [word for name in place or () for word in ("--place", name)]
        words += ["--dtype", dtype, "--draws", str(draws), *(["--full"] if full else [])]
        command = shlex.join(["kvdrift-bench", "promises", *words])
        every = [*cells, *planted]
        found, trials = sum(cell.found for cell in every), sum(cell.trials for cell in every)
        broken = sorted({cell.place for cell in every if not cell.is_kept})
        kept = "every promise is kept" if not broken else f"not kept at {', '.join(broken)}"
        text = f"`{command}`: {found} of {trials} found at their place; {kept}.\n\n{table(cells)}"
        if planted:
            text += f"\nIn running models, by whole audits without the ladder:\n\n{table(planted)}"
        if markdown is not None:
            PROMISES.write(markdown, text)
        typer.echo(text, nl=False)


def _require(what: str, given: Sequence[str], known: Iterable[str]) -> None:
    names = list(known)
    if wrong := [name for name in given if name not in names]:
        raise UsageError(f"unknown {what} {wrong[0]!r}; use --{what} with one of {', '.join(names)} ({what}=...)")


__all__ = ["promises"]
