"""`kvdrift-bench compare`: pairs of engines, with a fault in one of them and without."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift_bench.cli.console import Markdown, measuring, what_is_left

if TYPE_CHECKING:
    from kvdrift_bench.run.versus_runs import VersusRun


def compare(
    planted: Annotated[int, typer.Option(min=0, help="Pairs with a fault in one engine.")] = 36,
    clean: Annotated[int, typer.Option(min=0, help="Pairs of one model in two settings.")] = 100,
    size: Annotated[float, typer.Option(help="Size of a fault, relative to the result that it changes.")] = 1e-3,
    seed: Annotated[int, typer.Option(help="Of prompts and order.")] = 0,
    mlx: Annotated[bool, typer.Option(help="transformers against mlx-lm, architecture by architecture.")] = True,
    llamacpp: Annotated[bool, typer.Option(help="transformers against llama.cpp, file by file.")] = True,
    markdown: Markdown = None,
) -> None:
    """Compare engines, one with a fault in prefill, decode or both, and count the right guilty sides and addresses.

    Then transformers with mlx-lm and llama.cpp on the same weights.
    """
    with errors_as_messages(what_is_left(None)):
        from kvdrift_bench.figures.document import COMPARE
        from kvdrift_bench.run.versus_runs import clean_runs, planted_runs

        with measuring():
            faults = list(planted_runs(n=planted, size=size, seed=seed))
            without = list(clean_runs(n=clean, seed=seed))
            texts = [_of_faults(faults, without)]
            if mlx:
                texts.append(_of_mlx())
            if llamacpp:
                texts.append(_of_llamacpp())
        words = ["--planted", str(planted), "--clean", str(clean), "--size", f"{size:g}", "--seed", str(seed)]
        words += [] if mlx else ["--no-mlx"]
        words += [] if llamacpp else ["--no-llamacpp"]
        text = f"`{shlex.join(['kvdrift-bench', 'compare', *words])}`:\n\n" + "\n".join(texts)
        if markdown is not None:
            COMPARE.write(markdown, text)
        typer.echo(text, nl=False)


def _of_faults(faults: list[VersusRun], without: list[VersusRun]) -> str:
    from kvdrift_bench.run.versus_runs import table

    wrong = [run for run in faults if not run.right_side] + [run for run in without if run.verdict == "MISMATCH"]
    for run in wrong:
        typer.echo(f"wrong: {run}", err=True)
    alarms = sum(run.verdict == "MISMATCH" for run in without)
    passed = sum(run.verdict == "STRUCTURAL_DRIFT" for run in without)
    return (
        f"Guilty side right in {sum(run.right_side for run in faults)} of {len(faults)}, address in "
        f"{sum(run.right_place for run in faults)}; {alarms} alarms in {len(without)} clean pairs, {passed} of which "
        f"passed.\n\n{table(faults)}"
    )


def _of_mlx() -> str:
    from importlib.metadata import version

    from kvdrift_bench.run.versus_mlx import against_mlx, table_of_mlx

    found = list(against_mlx())
    agree = sum(item.verdict == "STRUCTURAL_DRIFT" for item in found)
    explained = sum(item.is_explained for item in found)
    return (
        f"transformers {version('transformers')} against mlx-lm {version('mlx-lm')}: {agree} of {len(found)} "
        f"architectures agree, {explained} do once mlx-lm does what the configuration says.\n\n{table_of_mlx(found)}"
    )


def _of_llamacpp() -> str:
    from kvdrift_bench.run.versus_llamacpp import against_llamacpp, table_of_llamacpp

    found = list(against_llamacpp())
    agree = sum(item.verdict == "STRUCTURAL_DRIFT" for item in found)
    return f"transformers against llama.cpp at float32: {agree} of {len(found)} agree.\n\n{table_of_llamacpp(found)}"


__all__ = ["compare"]
