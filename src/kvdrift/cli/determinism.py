"""`kvdrift determinism`: does a model compute the same again, in any batch, in the mode that it claims?"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from kvdrift.cli import options
from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.output import print_lines, print_result
from kvdrift.cli.progress import terminal_progress
from kvdrift.engines.open import find_engine, require_place
from kvdrift.vocabulary.plan import AuditPlan

app = typer.Typer()

_CLAIM = (
    "A mode to look for in the tensors: batch-invariant, kv-dtype=fp8 (float16, int4 ...), prefix-cache, static-cache, "
    "attention=sdpa. May be given several times."
)


@app.command(
    epilog="Examples:\n\n    kvdrift determinism\n\n    kvdrift determinism ./my-checkpoint --runs 20 --dtype bf16\n\n"
    "    kvdrift determinism ./my-checkpoint --claim kv-dtype=bf16 --claim batch-invariant\n\n"
    "Exit codes: 0 the same bits, or jitter of rounding, and every claim in effect; 1 different, or a claim not in "
    "effect; 2 usage, 3 engine unavailable, 4 capture failed, 6 cannot tell, 130 interrupted."
)
def determinism(
    context: typer.Context,
    model: options.Model = None,
    runs: Annotated[int, typer.Option(help="How often the text is run.")] = 10,
    claim: Annotated[list[str] | None, typer.Option(help=_CLAIM)] = None,
    prompt: options.Prompt = None,
    prompts: options.Prompts = None,
    dtype: options.Dtype = None,
    attn: options.Attn = None,
    cache: options.Cache = None,
    device: options.Device = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Run one text again and again, then in batches of 2 and 8 and beside other neighbours: bit-identical, jitter of
    rounding, or different, and from which tensor on."""
    with errors_as_messages():
        from kvdrift.pipeline.determinism import examine
        from kvdrift.verdict.claims import parse_claim

        claims = [parse_claim(text) for text in claim or ()]
        kind, place = find_engine(model)
        options.refuse_strays(context, kind.name, model)
        require_place(place)
        texts = options.read_prompts(prompt, prompts)
        of_engine = options.for_start(options.typed_options(context), kind.name)
        with (
            terminal_progress() as progress,
            redirect_stdout(sys.stderr),
            kind.open(place, AuditPlan(), progress, of_engine) as opened,
        ):
            found = examine(opened.engine, texts, opened.encode, n_runs=runs, claims=claims, progress=progress)
        if as_json:
            print_result(found.to_json())
        else:
            print_lines(found.lines())
    raise typer.Exit(found.exit_code)
