"""`kvdrift bench`: how good the verdicts are on this machine, measured by planting what they must find."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.errors import EngineUnavailable, KvdriftError, UsageError
from kvdrift.plan import AuditPlan

if TYPE_CHECKING:
    from kvdrift.bench.summary import Summary

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp64": "float64",
}
_DEFAULT = "default"

app = typer.Typer(no_args_is_help=True, help="Measure how good the verdicts are.")


@app.callback()
def root() -> None:
    """Measure how good the verdicts are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `kvdrift bench faults` is asked to do; see its options."""

    models: tuple[str, ...] = (_DEFAULT,)
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    attentions: tuple[str, ...] = ("sdpa", "eager")
    faults: tuple[str, ...] | None = None
    twins: bool = True
    n_clean: int = 20
    ladder: str = "both"
    span: int = AuditPlan().span
    out: Path | None = None
    markdown: Path | None = None
    json: Path | None = None

    @property
    def command(self) -> str:
        """The command that gives these figures, without the paths of this machine."""
        words = ["kvdrift", "bench", "faults"]
        for model in self.models:
            words += ["--model", Path(model).name if Path(model).exists() else model]
        words += ["--dtype", ",".join(self.dtypes), "--attn", ",".join(self.attentions)]
        words += ["--faults", ",".join(self.faults)] if self.faults is not None else []
        words += ["--twins" if self.twins else "--no-twins", "--clean", str(self.n_clean)]
        words += ["--ladder", self.ladder, "--span", str(self.span)]
        return shlex.join(words)


def bench_faults(options: BenchOptions, say: Callable[[str], None], progress: Any = None) -> Summary:
    """Run the corpus as asked, write the files that were asked for, and return the figures.

    What was measured before, and is in `options.out`, is not measured again; the figures are of what was asked now.
    """
    from kvdrift.bench.records import RecordFile, of_keys
    from kvdrift.bench.runner import LADDER_CHOICES, Bench, run_corpus
    from kvdrift.bench.subjects import choose_subjects, open_model
    from kvdrift.bench.summary import as_json, summarise
    from kvdrift.bench.tables import machine_facts, render, write_between_markers
    from kvdrift.bench.tiny import attends

    if options.ladder not in LADDER_CHOICES:
        raise UsageError(f"unknown ladder {options.ladder!r}; use --ladder model, off or both")
    if options.n_clean < 0:
        raise UsageError(f"--clean is {options.n_clean}, and must be 0 or more")
    file = RecordFile(options.out)
    keys = []
    for spec, dtype, attention in product(options.models, options.dtypes, options.attentions):
        if not attends(spec, attention):
            say(f"{spec} attends in eager mode only; {attention} is left out")
            continue
        loaded = open_model(spec, dtype, attention, say)
        names = None if options.faults is None else list(options.faults)
        subjects = choose_subjects(loaded.n_layers, faults=names, twins=options.twins, n_clean=options.n_clean)
        plan = AuditPlan(span=options.span, keep_traces=False)
        bench = Bench(loaded, dtype, attention, options.ladder, plan)
        keys += [bench.blank(subject).key for subject in subjects]
        for record in run_corpus(bench, subjects, file, progress):
            if record.skipped is None:
                say(_line(record))
    if not keys:
        raise UsageError("nothing is left to run; name a model, a dtype and an attention implementation that it has")
    summary = summarise(of_keys(file.records, keys))
    if options.markdown is not None:
        write_between_markers(options.markdown, render(summary, options.command, machine_facts()))
    if options.json is not None:
        whole = {"command": options.command, "machine": machine_facts(), **as_json(summary)}
        try:
            options.json.write_text(json.dumps(whole, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        except OSError as error:
            raise UsageError(f"cannot write {options.json}: {error.strerror}; name another file") from error
    return summary


def _line(record: Any) -> str:
    said = ", ".join(
        f"{way} {judged.verdict}" + (f" at {judged.address}" if judged.address else "")
        for way, judged in record.kvdrift.items()
    )
    name = record.prompts if record.kind == "clean" else record.name
    return f"{record.setting}: {record.kind} {name}: {record.error or said} ({record.seconds:.1f} s)"


@app.command(
    epilog="Examples:\n\n"
    "    kvdrift bench faults --model tiny:llama --dtype bf16 --attn sdpa --out bench.jsonl\n\n"
    "    kvdrift bench faults --out bench.jsonl --markdown docs/accuracy.md --json accuracy.json\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 4 capture failed, 130 interrupted."
)
def faults(
    model: Annotated[
        list[str] | None,
        typer.Option(help="default (the embedded model), tiny:llama and the like, or what an audit takes; repeatable."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="Native dtypes, with commas.")] = "bfloat16,float32",
    attn: Annotated[str, typer.Option(help="Attention implementations, with commas.")] = "sdpa,eager",
    faults: Annotated[str | None, typer.Option(help="Names of faults, with commas; default: all of them.")] = None,
    twins: Annotated[bool, typer.Option("--twins/--no-twins", help="Run the clean twins too.")] = True,
    clean: Annotated[int, typer.Option(help="Clean runs in each setting, each on other prompts.")] = 20,
    ladder: Annotated[
        str, typer.Option(help="model (with the ladder), off (native dtype alone) or both, from one capture.")
    ] = "both",
    span: Annotated[int, typer.Option(help="How many tokens after the prompt are probed.")] = AuditPlan().span,
    out: Annotated[
        Path | None, typer.Option(help="Lines of JSON, one a run; what it holds already is not run again.")
    ] = None,
    markdown: Annotated[Path | None, typer.Option(help="A document to put the figures into, between markers.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="The figures as JSON, ROC curves included.")] = None,
) -> None:
    """Plant every fault, clean twin and nothing at all, and count what kvdrift and other tools' rules say."""
    try:
        options = BenchOptions(
            models=tuple(model or (_DEFAULT,)),
            dtypes=tuple(_DTYPES.get(name, name) for name in _split(dtype)),
            attentions=_split(attn),
            faults=None if faults is None else _split(faults),
            twins=twins,
            n_clean=clean,
            ladder=ladder,
            span=span,
            out=out,
            markdown=markdown,
            json=json_file,
        )
        typer.echo(_run(options), nl=False)
    except KvdriftError as error:
        typer.echo(f"kvdrift: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        kept = f"; {out} holds what was measured, and the same command goes on from there" if out is not None else ""
        typer.echo(f"kvdrift: interrupted{kept}", err=True)
        raise typer.Exit(130) from error


def _run(options: BenchOptions) -> str:
    """Run with progress on stderr, and return the figures as Markdown."""
    from kvdrift.progress import terminal_progress

    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineUnavailable(f"the benchmark needs {error.name!r}; pip install 'kvdrift[hf]'") from error
    from kvdrift.bench.tables import machine_facts, render

    with terminal_progress() as progress, redirect_stdout(sys.stderr):
        summary = bench_faults(options, lambda text: typer.echo(text, err=True), progress)
    return render(summary, options.command, machine_facts())


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError("a list of names is empty; leave the option out to take the default")
    return parts


__all__ = ["BenchOptions", "app", "bench_faults"]
