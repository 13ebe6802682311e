"""The command line: reads options, calls the library, prints the result. Errors are one message and an exit code."""

from __future__ import annotations

import io
import os
import shlex
import sys
from contextlib import AbstractContextManager, nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from kvdrift import __version__
from kvdrift.cli.errors import told
from kvdrift.cli.server import INSIDE, is_address
from kvdrift.errors import EngineUnavailable, TraceError, UsageError
from kvdrift.vocabulary.plan import AuditPlan, parse_layers, parse_lengths

if TYPE_CHECKING:
    from kvdrift.pipeline.audit import Audit

_DEFAULTS = AuditPlan()
_PREFIX = "llamacpp:"
_LLAMACPP = "llama.cpp"
_SERVER = "A running server (its API key: KVDRIFT_API_KEY or OPENAI_API_KEY)"
_EXIT_CODES = (
    "Exit codes: 0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 3 engine unavailable, 4 capture failed, "
    "5 bad trace, 6 INCONCLUSIVE, 130 interrupted."
)

app = typer.Typer(
    name="kvdrift",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Is the difference between prefill and cached decode rounding, or a bug?",
    epilog=f"Example: `kvdrift audit`\n\n{_EXIT_CODES}",
)


@app.callback(invoke_without_command=True)
def root(
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    if version:
        typer.echo(f"kvdrift {__version__}")
        raise typer.Exit


@app.command(
    epilog="Examples:\n\n"
    "    kvdrift audit\n\n"
    "    kvdrift audit http://127.0.0.1:8000/v1 --model NAME --dtype bf16 --max-requests 300\n\n"
    "    kvdrift audit Qwen/Qwen2.5-0.5B --dtype bf16 --attn sdpa --out audit-qwen\n\n"
    "    kvdrift audit ./my-model --prompts prompts.jsonl --span 8 --mode kv_aligned\n\n"
    "    kvdrift audit --lengths 60-68,128,256-1024:256\n\n"
    "    kvdrift audit llamacpp:model.Q4_K_M.gguf --kv-type q8_0 --flash-attn on\n\n"
    f"    kvdrift audit mypackage.models:load --layers 0-3\n\n{_EXIT_CODES}"
)
def audit(
    context: typer.Context,
    model: Annotated[
        str | None,
        typer.Argument(
            help="A local directory, a hub id, a .gguf file, package.module:function that returns "
            "(model, tokenizer), llamacpp:FILE.gguf to run the file in llama.cpp, or http://HOST:PORT/v1 of a running "
            "server. Nothing: the embedded SmolLM2-135M-Instruct."
        ),
    ] = None,
    mode: Annotated[str, typer.Option(help="as_designed, kv_aligned or both.")] = _DEFAULTS.mode,
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A .txt file (a prompt a line) or .jsonl file of prompts.")
    ] = None,
    span: Annotated[
        int, typer.Option(help="How many tokens after the prompt are probed; a server: 32.")
    ] = _DEFAULTS.span,
    dtype: Annotated[
        str | None, typer.Option(help="bfloat16, float16, float32 or float64; default: the model's.")
    ] = None,
    attn: Annotated[str | None, typer.Option(help="Attention implementation, such as eager or sdpa.")] = None,
    cache: Annotated[str | None, typer.Option(help="Cache kind: dynamic or static; default: dynamic.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: where the model loads.")] = None,
    kv_type: Annotated[
        str | None,
        typer.Option(help="Type of K and V: f32, f16, bf16, q8_0, q4_0 ...; default: f16.", rich_help_panel=_LLAMACPP),
    ] = None,
    flash_attn: Annotated[
        str | None,
        typer.Option(help="on or off; default: on, as in llama.cpp.", rich_help_panel=_LLAMACPP),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Threads; default: all cores.", rich_help_panel=_LLAMACPP)] = None,
    n_batch: Annotated[
        int | None, typer.Option(help="Tokens that go through at once; default: 512.", rich_help_panel=_LLAMACPP)
    ] = None,
    scenario: Annotated[
        str, typer.Option(help="decode, all, or names with commas; `kvdrift scenarios` lists them.")
    ] = "decode",
    layers: Annotated[str | None, typer.Option(help="Layers to record, such as 0,3,10-12; default: all.")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            help="Prompt lengths in tokens, such as 60-68,128,256-1024:256: the longest prompt is cut or repeated to "
            "each, and lengths at which decode changes are named."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Chance of a false alarm that the whole audit may have.")
    ] = _DEFAULTS.alpha,
    seed: Annotated[int, typer.Option(help="Picks where the positive control is planted.")] = _DEFAULTS.seed,
    served: Annotated[
        str | None, typer.Option("--model", help="The name it serves the model under.", rich_help_panel=_SERVER)
    ] = None,
    max_requests: Annotated[
        int | None, typer.Option(help="Most requests to send; default: 300.", rich_help_panel=_SERVER)
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(help="Seconds that an answer may take; default: 60.", rich_help_panel=_SERVER)
    ] = None,
    resolution: Annotated[
        float | None,
        typer.Option(help="Typical error in nats that a pass must rule out; default: 0.05.", rich_help_panel=_SERVER),
    ] = None,
    ladder: Annotated[
        str,
        typer.Option(
            help="How the float32 and float64 runs are made: model (the whole model at once), layer (one layer at a "
            "time, for models that do not fit twice) or off (the native instruments decide alone)."
        ),
    ] = _DEFAULTS.ladder,
    out: Annotated[Path | None, typer.Option(help="The run directory itself; default: kvdrift-runs/TIME.")] = None,
    traces: Annotated[bool, typer.Option("--traces/--no-traces", help="Keep the recorded tensors.")] = True,
) -> None:
    """Audit a model: capture prefill and decode, compare them tensor by tensor, and decide."""
    from_server = {"model": served, "max_requests": max_requests, "timeout_s": timeout, "resolution": resolution}
    with _errors():
        if model is not None and is_address(model):
            _audit_server(model, context, from_server, _prompts(prompt, prompts), out)
        if option := next((name for name, value in from_server.items() if value is not None), None):
            flag = {"timeout_s": "timeout"}.get(option, option).replace("_", "-")
            raise UsageError(f"--{flag} is for a running server; name its address: kvdrift audit http://HOST:PORT/v1")
        plan = AuditPlan(
            mode=mode,  # type: ignore[arg-type]
            span=span,
            layers=None if layers is None else parse_layers(layers),
            alpha=alpha,
            ladder=ladder,  # type: ignore[arg-type]
            seed=seed,
            keep_traces=traces,
            lengths=None if lengths is None else parse_lengths(lengths),
        )
        given = _prompts(prompt, prompts)
        from kvdrift.report.run_directory import default_target
        from kvdrift.scenarios.catalogue import choose_scenarios

        choose_scenarios(scenario)  # a misspelt name is told before anything is loaded

        with nullcontext(out) if out is not None else default_target() as target:
            of_torch = {"--dtype": dtype, "--attn": attn, "--cache": cache, "--device": device}
            of_llamacpp = {
                "--kv-type": kv_type,
                "--flash-attn": flash_attn,
                "--threads": threads,
                "--n-batch": n_batch,
            }
            if model is not None and model.startswith(_PREFIX):
                _refuse(of_torch, f"is for models in torch, and {model} runs in llama.cpp")
                result = _run_llamacpp(
                    model.removeprefix(_PREFIX), plan, given, out=target, options=of_llamacpp, scenarios=scenario
                )
            else:
                _refuse(of_llamacpp, f"is for llama.cpp; name the model as {_PREFIX}FILE.gguf")
                result = _run(
                    model,
                    plan,
                    given,
                    dtype=dtype,
                    attn=attn,
                    cache=cache or "dynamic",
                    device=device,
                    scenarios=scenario,
                    out=target,
                )
        _print_summary(result)
    raise typer.Exit(result.exit_code)


def _audit_server(
    url: str, context: typer.Context, options: dict[str, Any], prompts: dict[str, Any] | None, out: Path | None
) -> NoReturn:
    from kvdrift.cli.server import run_audit
    from kvdrift.report.run_directory import default_target

    # Only what was typed: an option that a server has no use for is refused, and its default is none of it.
    shared = ("span", "dtype", "alpha", "seed", *INSIDE)
    typed = {
        name: context.params[name]
        for name in shared
        if getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }
    with nullcontext(out) if out is not None else default_target() as target:
        result = run_audit(url, {**options, **typed}, prompts, out=target, command=_command())
    _print(result.summary())
    raise typer.Exit(result.exit_code)


@app.command(
    epilog="Examples:\n\n    kvdrift judge kvdrift-runs/20260207-101500\n\n"
    f"    kvdrift judge engine-traces --format greta\n\n{_EXIT_CODES}"
)
def judge(
    run_dir: Annotated[Path, typer.Argument(help="A run that kept its traces, or a directory of trace files.")],
    alpha: Annotated[float | None, typer.Option(help="Judge with another alpha.")] = None,
    kind: Annotated[
        str, typer.Option("--format", help="auto, kvdrift, greta, sglang, npz or transformers-debug.")
    ] = "auto",
) -> None:
    """Judge saved traces without the model: those of an audit, or those that another program wrote."""
    with _errors():
        from kvdrift.cli.progress import terminal_progress
        from kvdrift.pipeline.judge import judge_directory

        with terminal_progress() as progress:
            result, recognised = judge_directory(
                _existing(run_dir), kind, alpha=alpha, progress=progress, command=_command()
            )
        if recognised is not None:
            typer.echo(f"kvdrift: {run_dir} holds {recognised}", err=True)
        _print(result.to_markdown())
    raise typer.Exit(result.exit_code)


@app.command(
    epilog="Example:\n\n    kvdrift show kvdrift-runs/20260207-101500 | less\n\n"
    "Exit codes: 0 printed, 2 usage, 5 no readable report."
)
def show(run_dir: Annotated[Path, typer.Argument(help="The directory of a run.")]) -> None:
    """Print the report of a run."""
    with _errors():
        path = _existing(run_dir) / "report.md"
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TraceError(f"cannot read {path}: {error}; is {run_dir} the directory of a finished run?") from error
        _print(text)


@app.command(
    epilog="Examples:\n\n    kvdrift scenarios\n\n    kvdrift audit --scenario rewind,batch_padded\n\n"
    "Exit codes: 0 printed, 2 usage."
)
def scenarios() -> None:
    """List the scenarios: routes to a token, what each can find, and where it applies."""
    from kvdrift.scenarios.catalogue import DECODE, DECODE_FINDS, SCENARIOS

    rows = [(DECODE, DECODE_FINDS, "every model"), *((s.name, s.finds, s.where) for s in SCENARIOS)]
    width = max(len(name) for name, *_ in rows)
    _print("".join(f"{name:{width}}  {finds}\n{'':{width}}  for {where}\n" for name, finds, where in rows))


def _run(
    spec: str | None,
    plan: AuditPlan,
    prompts: dict[str, Any] | None,
    *,
    dtype: str | None,
    attn: str | None,
    cache: str,
    device: str | None,
    scenarios: str,
    out: Path,
) -> Audit:
    from kvdrift.cli.progress import terminal_progress
    from kvdrift.report.run_directory import check_target

    check_target(out)
    # stdout carries the result alone, whatever a user's own model prints on its way.
    with terminal_progress() as progress, redirect_stdout(sys.stderr):
        progress.say("starting torch")
        _require_torch()
        from kvdrift.engines.hf.engine import HFEngine
        from kvdrift.engines.hf.load import load_model
        from kvdrift.pipeline.audit import audit_engine, encoder

        loaded = load_model(spec, dtype=dtype, attention=attn, device=device, progress=progress.say)
        progress.say(f"reading the roles of {loaded.name}")
        with HFEngine(
            loaded.model, name=loaded.name, cache=cache, layers=plan.layers, by_layer=plan.ladder == "layer"
        ) as engine:
            return audit_engine(
                engine,
                plan,
                prompts,
                encoder(loaded.tokenizer),
                out=out,
                command=_command(),
                progress=progress,
                scenarios=scenarios,
            )


def _run_llamacpp(
    path: str,
    plan: AuditPlan,
    prompts: dict[str, Any] | None,
    *,
    out: Path,
    options: dict[str, Any],
    scenarios: str = "decode",
) -> Audit:
    from kvdrift.cli.progress import terminal_progress
    from kvdrift.report.run_directory import check_target

    check_target(out)
    flash = options["--flash-attn"] or "on"
    if flash not in ("on", "off"):
        raise UsageError(f"--flash-attn is {flash!r}; use on or off")
    if not path.strip():
        raise UsageError(f"{_PREFIX} names no file; write {_PREFIX}FILE.gguf")
    with terminal_progress() as progress, redirect_stdout(sys.stderr):
        progress.say("starting llama.cpp")
        from kvdrift.engines.llamacpp.engine import LlamaCppEngine
        from kvdrift.pipeline.audit import audit_engine

        with LlamaCppEngine(
            path,
            kv_type=options["--kv-type"] or "f16",
            flash=flash == "on",
            threads=options["--threads"],
            n_batch=512 if options["--n-batch"] is None else options["--n-batch"],
            layers=plan.layers,
        ) as engine:
            return audit_engine(
                engine,
                plan,
                prompts,
                engine.encoder,
                out=out,
                command=_command(),
                progress=progress,
                scenarios=scenarios,
            )


def _refuse(options: dict[str, Any], why: str) -> None:
    """Refuse options that another engine takes: left alone, they would be thought to count."""
    for name, value in options.items():
        if value is not None:
            raise UsageError(f"{name} {why}")


def _command() -> str:
    return shlex.join(["kvdrift", *sys.argv[1:]])


def _require_torch() -> None:
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "transformers"):
            raise
        raise EngineUnavailable(f"auditing a model needs {error.name!r}; pip install 'kvdrift[hf]'") from error


def _prompts(texts: list[str] | None, path: Path | None) -> dict[str, Any] | None:
    from kvdrift.capture.prompts import name_prompts, read_prompt_file

    given: dict[str, Any] = {} if path is None else dict(read_prompt_file(path))
    for name, text in name_prompts(texts or ()).items():
        if name in given:
            raise UsageError(f"the prompt id {name!r} of {path} is that of a --prompt; give it another id in the file")
        given[name] = text
    return given or None


def _print_summary(result: Audit) -> None:
    view = result.view
    lines = [f"{result.verdict}{f' ({result.kind})' if result.kind else ''}: {view['hypotheses']['conclusion']}"]
    for name, outcome in view["modes"].items():
        if outcome["verdict"] is not None:
            lines.append(
                f"  {name}: {outcome['status']}, {outcome['n_within']} pairs within noise, "
                f"{outcome['n_beyond']} beyond, {outcome['n_exact']} of {outcome['n_pairs']} bit-exact"
            )
        else:
            lines.append(f"  {name}: NOT RUN")
    if len(view["scenarios"]) > 1:
        width = max(len(row["name"]) for row in view["scenarios"])
        for row in view["scenarios"]:
            said = row["verdict"] or "not applicable"
            why = row["first_failure"] or (row["reasons"][0] if row["reasons"] else "")
            lines.append(f"  {row['name']:{width}}  {said}{': ' if why else ''}{why}")
    lines += [f"  {item['text']}" for item in (view["lengths"] or {}).get("boundaries", [])]
    lines += [f"  - {line}" for line in view["recommendations"]]
    if result.path is not None:
        lines.append(f"report: {result.path / 'report.md'}")
    _print("\n".join(lines) + "\n")


def _print(text: str) -> None:
    """Write to stdout. A reader that has seen enough (`| head`) is no error, and leaves the exit code as it is."""
    try:
        typer.echo(text, nl=not text.endswith("\n"))
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _existing(run_dir: Path) -> Path:
    if not run_dir.is_dir():
        raise TraceError(f"there is no run directory {run_dir}")
    return run_dir


def _errors() -> AbstractContextManager[None]:
    return told("nothing was written")


def prepare_stdout() -> None:
    """Let stdout replace what a terminal's encoding lacks: a report has characters that some do not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def main() -> None:
    """Entry point of the console script."""
    prepare_stdout()
    app()
