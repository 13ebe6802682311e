"""`kvdrift-bench`: how good the verdicts are on this machine, measured by planting what they must find."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import AuditPlan
from kvdrift_bench.cli.compare import compare
from kvdrift_bench.cli.console import Markdown, Out, measuring, what_is_left
from kvdrift_bench.cli.cross import cross
from kvdrift_bench.cli.gallery import gallery
from kvdrift_bench.cli.gate import gate
from kvdrift_bench.cli.history import history
from kvdrift_bench.cli.kernels import kernels
from kvdrift_bench.cli.logprobs import logprobs
from kvdrift_bench.cli.promises import promises
from kvdrift_bench.cli.scenarios import scenarios
from kvdrift_bench.cli.servers import servers
from kvdrift_bench.run.options import EMBEDDED, BenchOptions

if TYPE_CHECKING:
    from kvdrift_bench.figures.summary import Summary

_DTYPES = {
    "bf16": "bfloat16",
    "fp16": "float16",
    "half": "float16",
    "fp32": "float32",
    "fp64": "float64",
}

# What weights in a GGUF file are called, by the names that torch has for it.
_WEIGHTS = {"bfloat16": "bf16", "float16": "f16", "fp16": "f16", "half": "f16", "float32": "f32", "fp32": "f32"}

app = typer.Typer(no_args_is_help=True, help="Measure how good the verdicts are.")
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench scenarios --faults rows_rolled,beam_reorder_skipped --model llama\n\n"
    "    kvdrift-bench scenarios --out matrix.jsonl --markdown docs/accuracy/scenarios.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(scenarios)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench kernels --kernels tiled_cpp,gemv_cpp --dtype bf16\n\n"
    "    kvdrift-bench kernels --draws 500 --out kernels.jsonl --markdown docs/accuracy/kernels.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(kernels)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench promises --place mlp_out --draws 1\n\n"
    "    kvdrift-bench promises --markdown docs/accuracy/promises.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(promises)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench history --pair llama-ring\n\n"
    "    kvdrift-bench history --markdown docs/history.md\n\n"
    "Exit codes: 0 every pair is told apart, 1 one is not, 2 usage, 3 mlx or a wheel is not to be had, 130 interrupted."
)(history)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench gate --clean 10 --faults 4\n\n"
    "    kvdrift-bench gate --out gate.jsonl --markdown docs/accuracy/gate.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(gate)
app.command(
    epilog="Example:\n\n    kvdrift-bench gallery --out build/gallery\n\n"
    "Exit codes: 0 written, 2 usage, 3 engine unavailable, 130 interrupted."
)(gallery)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench servers --model tiny --answers 1000\n\n"
    "    kvdrift-bench servers --markdown docs/accuracy/servers.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(servers)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench logprobs --record --pool pool.npz --markdown docs/accuracy/logprobs.md\n\n"
    "    kvdrift-bench logprobs --pool pool.npz --clean 60 --each 4\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(logprobs)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench cross --model-type llama\n\n"
    "    kvdrift-bench cross --rows cross.jsonl --markdown docs/zoo-cross.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(cross)
app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench compare --planted 6 --clean 5\n\n"
    "    kvdrift-bench compare --markdown docs/accuracy/compare.md\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 130 interrupted."
)(compare)


@app.callback()
def root() -> None:
    """Measure how good the verdicts are."""


def bench_faults(options: BenchOptions, say: Callable[[str], None], progress: Any = None) -> Summary:
    """Run the corpus as asked, write the files that were asked for, and return the figures.

    What was measured before, and is in `options.out`, is not measured again; the figures are of what was asked now.
    """
    from kvdrift_bench.figures.curves import curves_of
    from kvdrift_bench.figures.document import FAULTS, machine_facts, write_drawings, write_json
    from kvdrift_bench.figures.summary import as_json, summarise
    from kvdrift_bench.run.jobs import run_all
    from kvdrift_bench.run.records import Record, RecordFile, of_keys

    file = RecordFile(options.out, Record)
    keys = run_all(options, file, say, progress)
    if not keys:
        raise UsageError(
            "nothing is left to run; name a model, a dtype or cache type, and an attention implementation that it has"
        )
    summary = summarise(of_keys(file.records, keys))
    if options.markdown is not None:
        drawn = write_drawings(options.markdown, curves_of(summary))
        FAULTS.write(options.markdown, _rendered(summary, options, drawn))
    if options.json is not None:
        write_json(options.json, options.command, machine_facts(options.engine), as_json(summary))
    return summary


def _rendered(summary: Summary, options: BenchOptions, drawn: dict[str, str] | None = None) -> str:
    from kvdrift_bench.figures.document import machine_facts
    from kvdrift_bench.figures.render import render_faults

    by_fault = options.n_sets > 1 or options.faults is not None
    return render_faults(summary, options.command, machine_facts(options.engine), by_fault=by_fault, drawn=drawn)


@app.command(
    epilog="Examples:\n\n"
    "    kvdrift-bench faults --model tiny:llama --dtype bf16 --attn sdpa --out bench.jsonl\n\n"
    "    kvdrift-bench faults --out bench.jsonl --markdown docs/accuracy/bfloat16.md --json accuracy.json\n\n"
    "    kvdrift-bench faults --engine llamacpp --model tiny:llama --kv-type f16 --flash-attn on\n\n"
    "Exit codes: 0 measured, 2 usage, 3 engine unavailable, 4 capture failed, 130 interrupted."
)
def faults(
    engine: Annotated[
        str, typer.Option(help="hf (PyTorch models) or llamacpp (GGUF files): where the faults are planted.")
    ] = "hf",
    model: Annotated[
        list[str] | None,
        typer.Option(
            help="default (the embedded model), tiny:llama and the like, or another PyTorch model or GGUF file; "
            "repeatable."
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Native dtypes, with commas. hf: default bfloat16,float32. llamacpp: types that the weights are "
            "written in, such as f16,q8_0,q4_0; default: as they are."
        ),
    ] = None,
    attn: Annotated[
        str | None, typer.Option(help="hf: attention implementations, with commas; default: sdpa,eager.")
    ] = None,
    kv_type: Annotated[
        str | None, typer.Option(help="llamacpp: types of K and V, with commas; default: f16,q8_0.")
    ] = None,
    flash_attn: Annotated[
        str | None, typer.Option(help="llamacpp: off, on, or both with a comma; default: off,on.")
    ] = None,
    faults: Annotated[str | None, typer.Option(help="Names of faults, with commas; default: all of them.")] = None,
    twins: Annotated[bool, typer.Option("--twins/--no-twins", help="Run the clean twins too.")] = True,
    clean: Annotated[int, typer.Option(help="Clean runs in each setting, each on other prompts.")] = 20,
    sets: Annotated[int, typer.Option(help="Sets of prompts that each fault runs on.")] = 1,
    ladder: Annotated[
        str, typer.Option(help="model (with the ladder), off (native dtype alone) or both, from one capture.")
    ] = "both",
    span: Annotated[int, typer.Option(help="How many tokens after the prompt are probed.")] = AuditPlan().span,
    out: Out = None,
    markdown: Markdown = None,
    jobs: Annotated[int, typer.Option(help="Processes, with one thread and one model each.")] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="The figures as JSON, ROC curves included.")] = None,
) -> None:
    """Plant every fault, clean twin and nothing at all, and count what kvdrift and other tools' rules say."""
    with errors_as_messages(what_is_left(out)):
        options = BenchOptions(
            engine=engine,  # type: ignore[arg-type]  # checked there
            models=tuple(model or (EMBEDDED,)),
            **_ways(engine, dtype, {"attn": attn}, {"kv-type": kv_type, "flash-attn": flash_attn}),
            faults=None if faults is None else _split(faults),
            twins=twins,
            n_clean=clean,
            n_sets=sets,
            jobs=jobs,
            ladder=ladder,  # type: ignore[arg-type]  # checked there
            span=span,
            out=out,
            markdown=markdown,
            json=json_file,
        )
        typer.echo(_run(options), nl=False)


def _ways(
    engine: str, dtype: str | None, of_torch: dict[str, str | None], of_llamacpp: dict[str, str | None]
) -> dict[str, Any]:
    """Return how models are run, as fields of the options. What the other engine takes would be thought to count.

    Raises:
        UsageError: an option is for the other engine.
    """
    others = of_torch if engine == "llamacpp" else of_llamacpp
    if (stray := next((name for name, value in others.items() if value is not None), None)) is not None:
        needed = "hf" if engine == "llamacpp" else "llamacpp"
        raise UsageError(f"--{stray} is for --engine {needed}; leave it out, or name that engine")
    fields = {"attn": "attentions", "kv-type": "kv_types", "flash-attn": "flash"}
    given = {fields[name]: _split(value) for name, value in {**of_torch, **of_llamacpp}.items() if value is not None}
    if dtype is not None and engine == "llamacpp":
        given["weights"] = tuple(_WEIGHTS.get(name, name) for name in _split(dtype.lower()))
    elif dtype is not None:
        given["dtypes"] = tuple(_DTYPES.get(name, name) for name in _split(dtype))
    return given


def _run(options: BenchOptions) -> str:
    """Run with progress on stderr, and return the figures as Markdown."""
    with measuring(options.engine) as progress:
        summary = bench_faults(options, lambda text: typer.echo(text, err=True), progress)
    return _rendered(summary, options)


def _split(text: str) -> tuple[str, ...]:
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise UsageError("a list of names is empty; leave the option out to take the default")
    return parts


__all__ = ["BenchOptions", "app", "bench_faults", "faults", "root"]
