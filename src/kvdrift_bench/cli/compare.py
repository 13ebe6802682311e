"""`kvdrift-bench compare`: pairs of engines, with a fault in one of them and without."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left


def compare(
    planted: Annotated[int, typer.Option(min=0, help="Pairs with a fault in one engine.")] = 36,
    clean: Annotated[int, typer.Option(min=0, help="Pairs of one model in two settings.")] = 100,
    size: Annotated[float, typer.Option(help="Size of a fault, relative to the result that it changes.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of prompts and order.")] = 0,
    markdown: Markdown = None,
) -> None:
    """Compare engines, one with a fault in prefill, decode or both, and count the right guilty sides and addresses."""
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import COMPARE
        from kvdrift_bench.run.versus_runs import clean_runs, planted_runs, table

        with measuring():
            faults = list(planted_runs(n=planted, size=size, seed=seed))
            without = list(clean_runs(n=clean, seed=seed))
        for run in [run for run in faults if not run.right_side] + [
            run for run in without if run.verdict == "MISMATCH"
        ]:
            typer.echo(f"wrong: {run}", err=True)
        words = ["--planted", str(planted), "--clean", str(clean), "--size", f"{size:g}", "--seed", str(seed)]
        command = shlex.join(["kvdrift-bench", "compare", *words])
        alarms = sum(run.verdict == "MISMATCH" for run in without)
        passed = sum(run.verdict == "STRUCTURAL_DRIFT" for run in without)
        text = (
            f"`{command}`: guilty side right in {sum(run.right_side for run in faults)} of {len(faults)}, address in "
            f"{sum(run.right_place for run in faults)}; {alarms} alarms in {len(without)} clean pairs, {passed} of "
            f"which passed.\n\n{table(faults)}"
        )
        if markdown is not None:
            COMPARE.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["compare"]
