"""`kvdrift-bench logprobs`: dumps of a sampler and a trainer, with and without a fault, drawn from a recorded pool."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left


def logprobs(
    pool: Annotated[Path, typer.Option(help="The .npz file that holds the recorded pool.")] = Path("logprob-pool.npz"),
    record: Annotated[
        bool, typer.Option("--record", help="Record the pool first, from the embedded model; about ten minutes.")
    ] = False,
    clean: Annotated[int, typer.Option(min=0, help="Dumps without a fault.")] = 300,
    each: Annotated[int, typer.Option(min=0, help="Dumps of each fault at each dtype.")] = 10,
    seed: Annotated[int, typer.Option(help="Of sampling and of drawing.")] = 0,
    markdown: Markdown = None,
) -> None:
    """Draw dumps of sampled tokens and their logprobs, with faults in sampler or trainer, and count right verdicts."""
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import LOGPROBS
        from kvdrift_bench.figures.logprob_figures import summary, table
        from kvdrift_bench.run.logprob_runs import load_pool, run_dumps

        with measuring():
            if record:
                from kvdrift_bench.run.logprob_pool import record_pool

                record_pool(pool, seed, lambda text: typer.echo(text, err=True))
            runs = list(run_dumps(load_pool(pool), clean=clean, each=each, seed=seed))
        words = ["--record", "--clean", str(clean), "--each", str(each), "--seed", str(seed)]
        command = shlex.join(["kvdrift-bench", "logprobs", *words])
        text = f"`{command}`: {summary(runs)}\n\n{table(runs)}"
        if markdown is not None:
            LOGPROBS.write(markdown, text)
        typer.echo(text, nl=False)


__all__ = ["logprobs"]
