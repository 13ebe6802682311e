"""`kvdrift-bench kernels`: correct kernels by other means, which must pass, and faults of such kernels."""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import UsageError
from kvdrift_bench.cli.console import Markdown, Out, measuring, what_is_left
from kvdrift_bench.run.options import LADDER_CHOICES

if TYPE_CHECKING:
    from kvdrift_bench.figures.kernel_figures import KernelFigures
    from kvdrift_bench.run.kernel_runs import Ladder

_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp32": "float32"}
_NONE = "none"
_KNOWN = ("bfloat16", "float16", "float32")


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelOptions:
    """What `kvdrift-bench kernels` is asked to do; `kernels` names correct ones and faults; None is all of them."""

    kernels: tuple[str, ...] | None = None
    models: tuple[str, ...] = ("tiny:llama",)
    dtypes: tuple[str, ...] = _KNOWN
    ladder: str = "both"
    faults: bool = True
    draws: int = 0
    out: Path | None = None
    markdown: Path | None = None

    def __post_init__(self) -> None:
        if wrong := [dtype for dtype in self.dtypes if dtype not in _KNOWN]:
            raise UsageError(f"unknown dtype {wrong[0]!r}; use --dtype {', '.join(_KNOWN)} (dtypes=...)")
        if self.ladder not in LADDER_CHOICES:
            raise UsageError(f"unknown ladder {self.ladder!r}; use --ladder model, off or both (ladder=...)")
        if self.draws < 0:
            raise UsageError(f"--draws is {self.draws}, and must be 0 or more; use --draws 0 (draws=0)")

    @property
    def ladders(self) -> tuple[Ladder, ...]:
        """The values of an audit's `--ladder`."""
        found: dict[str, tuple[Ladder, ...]] = {"model": ("model",), "off": ("off",), "both": ("model", "off")}
        return found[self.ladder]

    @property
    def command(self) -> str:
        """The command that gives these figures, without the paths of this machine."""
        words = ["kvdrift-bench", "kernels"]
        words += [] if self.kernels is None else ["--kernels", ",".join(self.kernels) or _NONE]
        for model in self.models:
            words += ["--model", model]
        words += ["--dtype", ",".join(self.dtypes), "--ladder", self.ladder]
        words += [] if self.faults else ["--no-faults"]
        words += ["--draws", str(self.draws)] if self.draws else []
        return shlex.join(words)


def bench_kernels(options: KernelOptions, say: Callable[[str], None], progress: Any = None) -> KernelFigures:
    """Run as asked, write the files that were asked for, and return the figures.

    What is in `options.out` already is not run again.
    """
    from kvdrift_bench.figures.document import KERNELS, machine_facts
    from kvdrift_bench.figures.kernel_figures import summarise_kernels
    from kvdrift_bench.figures.render import render_kernels
    from kvdrift_bench.run.kernel_runs import Grid, KernelRun, draw_trials, run_kernels
    from kvdrift_bench.run.records import RecordFile, of_keys

    grid = Grid(
        models=options.models,
        dtypes=options.dtypes,
        ladders=options.ladders,
        names=options.kernels,
        faults=options.faults,
    )
    trials = grid.trials() + draw_trials(options.draws, options.dtypes, options.ladders)
    if not trials:
        raise UsageError("nothing is left to run; name a kernel that the model can carry, or use --draws")
    file = RecordFile(options.out, KernelRun)
    for run in run_kernels(trials, file, progress):
        if run.error or (run.verdict == "MISMATCH") != (run.kind == "fault"):
            where = run.error or f"{run.verdict} {run.address or ''}".strip()
            say(f"{run.kind} {run.name} ({run.passes}), {run.model} {run.dtype}, ladder {run.ladder}: {where}")
    figures = summarise_kernels(of_keys(file.records, [trial.run.key for trial in trials]))
    if options.markdown is not None:
        KERNELS.write(options.markdown, render_kernels(figures, options.command, machine_facts()))
    return figures


def kernels(
    names: Annotated[
        str | None,
        typer.Option("--kernels", help="Correct kernels and faults, with commas; none; default: all of them."),
    ] = None,
    model: Annotated[
        list[str] | None, typer.Option(help="tiny:llama and the like, or default (the embedded model); repeatable.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Native dtypes, with commas.")] = ",".join(_KNOWN),
    ladder: Annotated[str, typer.Option(help="model, off or both: as an audit has it, or each of the two.")] = "both",
    faults: Annotated[bool, typer.Option("--faults/--no-faults", help="Run the faults of kernels too.")] = True,
    draws: Annotated[int, typer.Option(help="Clean audits of kernels, dtypes and prompts drawn at random.")] = 0,
    out: Out = None,
    markdown: Markdown = None,
) -> None:
    """Let correct kernels compute parts of a model, which must pass, and plant faults in such kernels."""
    with errors_as_messages(what_is_left(out)):
        options = KernelOptions(
            kernels=None if names is None else () if names == _NONE else _split(names),
            models=tuple(model or ("tiny:llama",)),
            dtypes=tuple(_DTYPES.get(name, name) for name in _split(dtype)),
            ladder=ladder,
            faults=faults,
            draws=draws,
            out=out,
            markdown=markdown,
        )
        typer.echo(_run(options), nl=False)


def _run(options: KernelOptions) -> str:
    """Run with progress on stderr, and return the figures as Markdown."""
    from kvdrift_bench.figures.document import machine_facts
    from kvdrift_bench.figures.render import render_kernels

    with measuring() as progress:
        figures = bench_kernels(options, lambda text: typer.echo(text, err=True), progress)
    return render_kernels(figures, options.command, machine_facts())


def _split(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())


__all__ = ["KernelOptions", "bench_kernels", "kernels"]
