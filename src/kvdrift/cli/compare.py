"""`kvdrift compare`: A against B."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.options import AsJson, Out, Prompt, Prompts, read_prompts
from kvdrift.cli.output import command_line, print_lines, print_result
from kvdrift.cli.progress import terminal_progress

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n    kvdrift compare sampler.jsonl trainer.jsonl --dtype-a bf16 --dtype-b fp32\n\n"
    "    kvdrift compare sampler.jsonl trainer.jsonl --third prefill.jsonl --drop tme:1.05 --out runs/step-400\n\n"
    "    kvdrift compare rollout.jsonl:rollout_log_probs rollout.jsonl:old_log_probs --json\n\n"
    "    kvdrift compare ./my-checkpoint llamacpp:model.gguf --prompt 'def merge(left, right):'\n\n"
    "    kvdrift compare kvdrift-runs/20260207-101500 kvdrift-runs/20260208-093000\n\n"
    "    kvdrift compare http://127.0.0.1:8000/v1 ./my-checkpoint --dtype-a bf16\n\n"
    "Exit codes: 0 STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 3 engine unavailable, 4 capture failed, 5 what cannot be "
    "read or laid beside each other, 6 INCONCLUSIVE."
)
def compare(
    a: Annotated[
        str, typer.Argument(metavar="A", help="Dump of a sampler (FILE or FILE:COLUMN), traces, model, or server.")
    ],
    b: Annotated[str, typer.Argument(metavar="B", help="The other one: a trainer's dump, traces, model, or server.")],
    third: Annotated[
        str | None, typer.Option(help="The same tokens scored by A's engine in a prefill: tells which side is off.")
    ] = None,
    repeat: Annotated[str | None, typer.Option(help="A made a second time, at another batch size: its noise.")] = None,
    repeat_b: Annotated[str | None, typer.Option(help="B made a second time: its noise.")] = None,
    dtype_a: Annotated[str | None, typer.Option(help="What A computes in: fp32, bf16, fp16, int8, fp8, int4.")] = None,
    dtype_b: Annotated[str | None, typer.Option(help="What B computes in.")] = None,
    drop: Annotated[
        str | None,
        typer.Option(
            help="The rule by which sequences are dropped: tme, geo, seq, max or k3, and its limit; tme:1.05."
        ),
    ] = None,
    alpha: Annotated[
        float | None, typer.Option(help="Chance of a false alarm that the comparison of two dumps may have; 0.001.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the shuffles; 0.")] = None,
    prompt: Prompt = None,
    prompts: Prompts = None,
    span: Annotated[
        int | None, typer.Option(help="Tokens after the prompt that are compared; engines: 4, servers: 8 or 32.")
    ] = None,
    model_a: Annotated[str | None, typer.Option(help="The name under which server A serves the model.")] = None,
    model_b: Annotated[str | None, typer.Option(help="The name under which server B serves it.")] = None,
    max_requests: Annotated[int | None, typer.Option(help="Most requests to each server; 300.")] = None,
    timeout: Annotated[float | None, typer.Option(help="Seconds that one answer of a server may take; 60.")] = None,
    out: Out = None,
    as_json: AsJson = False,
) -> None:
    """Say whether A and B differ by more than rounding, from where on, and which of them is off.

    Two dumps of the logprobs of the same tokens, two directories of traces, two engines, or two servers. A server can
    be compared with an engine too: A samples texts, and both score them.
    """
    with errors_as_messages():
        from contextlib import nullcontext, redirect_stdout

        from kvdrift.pipeline.compare import compare as compare_both
        from kvdrift.report.run_directory import default_target

        with (
            nullcontext(out) if out is not None else default_target() as target,
            terminal_progress() as progress,
            redirect_stdout(sys.stderr),
        ):
            result = compare_both(
                a,
                b,
                out=target,
                command=command_line(),
                progress=progress,
                third=third,
                repeat=repeat,
                repeat_b=repeat_b,
                dtype_a=dtype_a,
                dtype_b=dtype_b,
                drop=drop,
                alpha=alpha,
                seed=seed,
                prompts=read_prompts(prompt, prompts),
                span=span,
                model_a=model_a,
                model_b=model_b,
                max_requests=max_requests,
                timeout=timeout,
            )
        if as_json:
            print_result(result.to_json())
        else:
            print_lines(result.summary().splitlines())
    raise typer.Exit(result.exit_code)
