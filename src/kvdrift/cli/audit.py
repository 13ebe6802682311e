"""`kvdrift audit`: one command for every engine, and for a server."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from kvdrift.cli import options
from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.output import EXIT_CODES, command_line, print_result
from kvdrift.cli.progress import terminal_progress
from kvdrift.cli.server import audit_address, is_address
from kvdrift.engines.open import EngineKind, find_engine, require_place
from kvdrift.vocabulary.plan import AuditPlan, Prompts, parse_layers, parse_lengths

if TYPE_CHECKING:
    from kvdrift.pipeline.audit import Audit

_PLAN = AuditPlan()

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n"
    "    kvdrift audit\n\n"
    "    kvdrift audit http://127.0.0.1:8000/v1 --model NAME --dtype bf16 --max-requests 300\n\n"
    "    kvdrift audit Qwen/Qwen2.5-0.5B --dtype bf16 --attn sdpa --out audit-qwen\n\n"
    "    kvdrift audit ./my-model --prompts prompts.jsonl --span 8 --mode kv_aligned\n\n"
    "    kvdrift audit --lengths 60-68,128,256-1024:256\n\n"
    "    kvdrift audit llamacpp:model.Q4_K_M.gguf --kv-type q8_0 --flash-attn on\n\n"
    f"    kvdrift audit mypackage.models:load --layers 0-3\n\n{EXIT_CODES}"
)
def audit(
    context: typer.Context,
    model: options.Model = None,
    mode: options.Mode = _PLAN.mode,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    span: options.Span = _PLAN.span,
    dtype: options.Dtype = None,
    attn: options.Attn = None,
    cache: options.Cache = None,
    device: options.Device = None,
    kv_type: options.KvType = None,
    flash_attn: options.FlashAttn = None,
    threads: options.Threads = None,
    n_batch: options.NBatch = None,
    scenario: options.Scenario = "decode",
    layers: options.Layers = None,
    lengths: options.Lengths = None,
    alpha: options.Alpha = _PLAN.alpha,
    seed: options.Seed = _PLAN.seed,
    served: options.Served = None,
    max_requests: options.MaxRequests = None,
    timeout: options.Timeout = None,
    resolution: options.Resolution = None,
    against: options.Against = None,
    ladder: options.Ladder = _PLAN.ladder,
    out: options.Out = None,
    traces: options.Traces = True,
    as_json: options.AsJson = False,
) -> None:
    """Audit a model: capture prefill and decode, compare them tensor by tensor, and decide."""
    with errors_as_messages():
        typed = options.typed_options(context)
        if model is not None and is_address(model):
            options.refuse_strays(context, options.SERVER, model)
            summary, code = audit_address(model, typed, options.read_prompts(prompt, prompts), out, as_json)
        else:
            kind, place = find_engine(model)
            options.refuse_strays(context, kind.name, model)
            require_place(place)
            plan = AuditPlan(
                mode=mode,  # type: ignore[arg-type]  # checked there
                span=span,
                layers=None if layers is None else parse_layers(layers),
                alpha=alpha,
                ladder=ladder,  # type: ignore[arg-type]  # checked there
                seed=seed,
                keep_traces=traces,
                lengths=None if lengths is None else parse_lengths(lengths),
            )
            texts = options.read_prompts(prompt, prompts)
            result = audit_here(kind, place, plan, texts, options.for_start(typed, kind.name), scenario, out)
            summary, code = result.to_json() if as_json else _summary(result), result.exit_code
        print_result(summary)
    raise typer.Exit(code)


def audit_here(
    kind: EngineKind,
    place: str | None,
    plan: AuditPlan,
    prompts: Prompts | None,
    of_engine: Mapping[str, Any],
    scenarios: str,
    out: Path | None,
) -> Audit:
    """Open the model in its engine and audit it."""
    from kvdrift.pipeline.audit import audit_engine
    from kvdrift.report.run_directory import check_target, default_target
    from kvdrift.scenarios.catalogue import choose_scenarios

    choose_scenarios(scenarios)  # a misspelt name is told before anything is loaded
    with nullcontext(out) if out is not None else default_target() as target:
        check_target(target)
        # stdout carries the result alone, whatever a user's own model prints on its way.
        with (
            terminal_progress() as progress,
            redirect_stdout(sys.stderr),
            kind.open(place, plan, progress, of_engine) as opened,
        ):
            return audit_engine(
                opened.engine,
                plan,
                prompts,
                opened.encode,
                out=target,
                command=command_line(),
                progress=progress,
                scenarios=scenarios,
            )


def _summary(result: Audit) -> str:
    """Return what the terminal gets of a report: modes, scenarios, lengths, what to do, and the panel."""
    from kvdrift.cli.panel import panel
    from kvdrift.cli.screen import Screen

    view, screen = result.view, Screen.of_stdout()
    lines = []
    for name, outcome in view["modes"].items():
        if outcome["verdict"] is not None:
            lines.append(
                f"{name}: {outcome['status']}, {outcome['n_within']} pairs within noise, "
                f"{outcome['n_beyond']} beyond, {outcome['n_exact']} of {outcome['n_pairs']} bit-exact"
            )
        else:
            lines.append(f"{name}: NOT RUN")
    if len(view["scenarios"]) > 1:
        width = max(len(row["name"]) for row in view["scenarios"])
        for row in view["scenarios"]:
            said = row["verdict"] or "not applicable"
            why = row["first_failure"] or (row["reasons"][0] if row["reasons"] else "")
            lines.append(f"{row['name']:{width}}  {said}{': ' if why else ''}{why}")
    lines += [item["text"] for item in (view["lengths"] or {}).get("boundaries", [])]
    lines += [f"- {line}" for line in view["recommendations"]]
    return screen.lines(lines) + panel(view, result.path, screen)
