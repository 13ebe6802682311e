"""The options of the command line: what each is called, what its help says, and for which engines it is meant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from kvdrift.engines.open import ENGINES
from kvdrift.errors import TraceError, UsageError

# What a server is called here. Its scheme is not a prefix of ENGINES: nothing of a server runs in this process.
SERVER = "server"
_HERE = frozenset(kind.name for kind in ENGINES)
_ALL = _HERE | {SERVER}

# For which engines each option of `audit` is meant. One that is meant for some of those in this process, not for all
# of them, is a keyword argument of their `start`.
MEANT_FOR: Mapping[str, frozenset[str]] = {
    "mode": _HERE,
    "prompt": _ALL,
    "prompts": _ALL,
    "span": _ALL,
    "dtype": frozenset({"hf", SERVER}),
    "attn": frozenset({"hf"}),
    "cache": frozenset({"hf", "mlx"}),
    "device": frozenset({"hf"}),
    "kv_type": frozenset({"llamacpp"}),
    "flash_attn": frozenset({"llamacpp"}),
    "threads": frozenset({"llamacpp"}),
    "n_batch": frozenset({"llamacpp"}),
    "scenario": _HERE,
    "layers": _HERE,
    "lengths": _HERE,
    "alpha": _ALL,
    "seed": _ALL,
    "served": frozenset({SERVER}),
    "max_requests": frozenset({SERVER}),
    "timeout": frozenset({SERVER}),
    "resolution": frozenset({SERVER}),
    "against": frozenset({SERVER}),
    "ladder": _HERE,
    "out": _ALL,
    "traces": _HERE,
    "as_json": _ALL,
}

_LLAMACPP_PANEL = "llama.cpp"
_SERVER_PANEL = "A running server (its API key: KVDRIFT_API_KEY or OPENAI_API_KEY)"

Model = Annotated[
    str | None,
    typer.Argument(
        help="A local directory, a hub id, a .gguf file, package.module:function that returns "
        "(model, tokenizer), llamacpp:FILE.gguf to run the file in llama.cpp, mlx:PATH to run a model in mlx, or "
        "http://HOST:PORT/v1 of a running server. Nothing: the embedded SmolLM2-135M-Instruct."
    ),
]
Mode = Annotated[str, typer.Option(help="as_designed, kv_aligned or both.")]
Prompt = Annotated[list[str] | None, typer.Option(help="A prompt; may be given several times.")]
Prompts = Annotated[Path | None, typer.Option(help="A .txt file (one prompt per line) or .jsonl file of prompts.")]
Span = Annotated[int, typer.Option(help="How many tokens after the prompt are probed; a server: 32.")]
Dtype = Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or float64; default: the model's.")]
Attn = Annotated[str | None, typer.Option(help="Attention implementation, such as eager or sdpa.")]
Cache = Annotated[
    str | None,
    typer.Option(
        help="Cache kind: dynamic or static; default: dynamic. In mlx: default, batch, quantized, rotating or chunked."
    ),
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 ...; default: where the model loads.")]
KvType = Annotated[
    str | None,
    typer.Option(
        help="Type of K and V: f32, f16, bf16, q8_0, q4_0 ...; default: f16.", rich_help_panel=_LLAMACPP_PANEL
    ),
]
FlashAttn = Annotated[
    str | None, typer.Option(help="on or off; default: on, as in llama.cpp.", rich_help_panel=_LLAMACPP_PANEL)
]
Threads = Annotated[int | None, typer.Option(help="Threads; default: all cores.", rich_help_panel=_LLAMACPP_PANEL)]
NBatch = Annotated[
    int | None,
    typer.Option(help="Tokens that go through at once; default: 512.", rich_help_panel=_LLAMACPP_PANEL),
]
Scenario = Annotated[str, typer.Option(help="decode, all, or names with commas; `kvdrift scenarios` lists them.")]
Layers = Annotated[str | None, typer.Option(help="Layers to record, such as 0,3,10-12; default: all.")]
Lengths = Annotated[
    str | None,
    typer.Option(
        help="Prompt lengths in tokens, such as 60-68,128,256-1024:256: the longest prompt is cut or repeated to "
        "each, and lengths at which decode changes are named."
    ),
]
Alpha = Annotated[float, typer.Option(help="Chance of a false alarm that the whole audit may have.")]
Seed = Annotated[int, typer.Option(help="Picks where the positive control is planted.")]
Served = Annotated[
    str | None,
    typer.Option("--model", help="The name it serves the model under.", rich_help_panel=_SERVER_PANEL),
]
MaxRequests = Annotated[
    int | None, typer.Option(help="Most requests to send; default: 300.", rich_help_panel=_SERVER_PANEL)
]
Timeout = Annotated[
    float | None,
    typer.Option(help="Seconds that an answer may take; default: 60.", rich_help_panel=_SERVER_PANEL),
]
Resolution = Annotated[
    float | None,
    typer.Option(help="Typical error in nats that a pass must rule out; default: 0.05.", rich_help_panel=_SERVER_PANEL),
]
Against = Annotated[
    str | None,
    typer.Option(
        help="Address of a second server that this one must agree with: same model and build, started as this one is "
        "said to be (its API key: KVDRIFT_AGAINST_API_KEY).",
        rich_help_panel=_SERVER_PANEL,
    ),
]
Ladder = Annotated[
    str,
    typer.Option(
        help="How the float64 run is made: model (the whole model at once), layer (one layer at a "
        "time, for models that do not fit twice) or off (the native instruments decide alone)."
    ),
]
Out = Annotated[Path | None, typer.Option(help="The run directory itself; default: kvdrift-runs/TIME.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON and nothing else.")]
AsMarkdown = Annotated[
    bool, typer.Option("--markdown", help="Print the report as Markdown, as it was written, and nothing else.")
]
Traces = Annotated[bool, typer.Option("--traces/--no-traces", help="Keep the recorded tensors.")]


def typed_options(context: typer.Context) -> dict[str, Any]:
    """Return the options of `audit` that were typed, by the names of their parameters; a default is not among them."""
    return {
        name: value
        for name, value in context.params.items()
        if name in MEANT_FOR and getattr(context.get_parameter_source(name), "name", None) == "COMMANDLINE"
    }


def refuse_strays(context: typer.Context, engine: str, model: str | None) -> None:
    """Refuse options that are not meant for the engine: left alone, they would be thought to count.

    Raises:
        UsageError: such an option was typed.
    """
    for name in typed_options(context):
        if engine not in MEANT_FOR[name]:
            parameter = next(each for each in context.command.params if each.name == name)
            flag = "/".join([parameter.opts[0], *parameter.secondary_opts[:1]])
            raise UsageError(f"{flag} {_why_not(name, engine, model)}")


def _why_not(name: str, engine: str, model: str | None) -> str:
    if engine == SERVER and name == "lengths":
        return (
            "cuts a prompt to exact numbers of tokens, and tokens are the server's own affair; leave it out and give "
            "prompts of several lengths (--prompts FILE)"
        )
    if engine == SERVER:
        return "reaches into an engine, and a server gives nothing but logprobs; leave it out"
    wanted = next((kind for kind in ENGINES if kind.name in MEANT_FOR[name]), None)
    if wanted is None:
        return "is for a running server; name its address: kvdrift audit http://HOST:PORT/v1"
    if wanted.prefix:
        return f"is for {wanted.runs}; name the model as {wanted.prefix}{wanted.place}"
    running = next(kind for kind in ENGINES if kind.name == engine)
    return f"is for {wanted.runs}, and {model} runs in {running.runs}"


def for_start(typed: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """Return what goes to the `start` of an engine, of the options that were typed."""
    return {name: value for name, value in typed.items() if not MEANT_FOR[name] >= _HERE and engine in MEANT_FOR[name]}


def read_prompts(texts: Iterable[str] | None, path: Path | None) -> dict[str, str | list[int]] | None:
    """Return the prompts that --prompt and --prompts name, None for none of them.

    Raises:
        UsageError: the file cannot be read, an id is used twice, or a prompt is empty.
    """
    from kvdrift.capture.prompts import name_prompts, read_prompt_file

    prompts: dict[str, Any] = {} if path is None else dict(read_prompt_file(path))
    for name, text in name_prompts(list(texts or ())).items():
        if name in prompts:
            raise UsageError(f"the prompt id {name!r} of {path} is that of a --prompt; give it another id in the file")
        prompts[name] = text
    for name, prompt in prompts.items():  # told before an engine starts
        if not prompt:
            raise UsageError(f"the prompt {name!r} is empty (no tokens); give at least one token")
    return prompts or None


SCOPE = (
    "Judge less than everything, and say so: attention, layers=0-3, up-to=SITE or sampled (what was recorded of each "
    "tensor, at one precision). May be given several times."
)


def existing_run(directory: Path) -> Path:
    """Return the directory of a run, which must be there.

    Raises:
        TraceError: it is not.
    """
    if not directory.is_dir():
        raise TraceError(f"there is no run directory {directory}")
    return directory
