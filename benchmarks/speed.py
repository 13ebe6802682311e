"""How near kvdrift's cost comes to that of the forward passes themselves: each row a ratio within one run.

What is compared is run in turn, repetition by repetition, so that both sides meet the same machine; the median of the
ratios counts, and their spread is printed beside it. A row whose goal is missed says so, and so does one that was not
measured.
"""

from __future__ import annotations

import argparse
import gc
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

import kvdrift
from benchmarks import cost, judging
from benchmarks.support import bytes_of, demo, say
from kvdrift.capture.modes import continue_greedily
from kvdrift.capture.prompts import default_prompts
from kvdrift.engines.encode import encoder
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.hf.load import LoadedModel
from kvdrift.engines.torch.precision import DTYPES, at_dtype
from kvdrift.trace.model import Trace
from kvdrift.vocabulary.plan import LadderChoice
from kvdrift_bench.figures.markers import Markers

SPAN = 4
TODAY_ALL_S = 272.0  # `--scenario all` on SmolLM2 before prefills were shared further
_LONG = 8000
_LIMIT_IMPORT_S = 0.3

Texts = dict[str, tuple[list[int], list[int]]]  # by name: a prompt, and what the model puts after it


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table; `values` are the repetitions, none where nothing was measured and `note` says why."""

    what: str
    measure: str
    limit: float
    values: Sequence[float] = ()
    unit: str = ""
    at_least: bool = False
    note: str = ""

    @property
    def is_met(self) -> bool:
        """Whether the goal was measured and reached."""
        if not self.values:
            return False
        median = statistics.median(self.values)
        return median >= self.limit if self.at_least else median <= self.limit

    def line(self) -> str:
        """Return the row of the table."""
        goal = f"{'>=' if self.at_least else '<='} {self.limit:g}{self.unit}"
        if not self.values:
            return f"| {self.what} | {self.measure} | {goal} | | not measured: {self.note} |"
        spread = f" ({min(self.values):.3g} to {max(self.values):.3g})" if len(self.values) > 1 else ""
        found = f"{statistics.median(self.values):.3g}{self.unit}{spread}"
        state = "met" if self.is_met else "falls short"
        return f"| {self.what} | {self.measure} | {goal} | {found} | {state}{f'; {self.note}' if self.note else ''} |"


def run(options: argparse.Namespace) -> bool:
    """Measure every row, print the table, and put it into docs/performance.md with `--document`."""
    began = time.perf_counter()
    rows = [
        *_audits(options.repeats),
        *_captures(options.repeats),
        *_judging(options.repeats),
        *_starts(options.repeats),
    ]
    rows += _full() if options.full else _left_out()
    torch_threads = f"{torch.get_num_threads()} threads of torch"
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch_threads}; Python {platform.python_version()}"
    versions = f"kvdrift {kvdrift.__version__}, torch {torch.__version__}, numpy {np.__version__}"
    lines = [
        "| work | measure | goal | median (spread) | |",
        "|---|---|---|---|---|",
        *(row.line() for row in rows),
        "",
        f"{machine}; {versions}; {options.repeats} repetitions, {time.perf_counter() - began:.0f} s.",
    ]
    for line in lines:
        say(line)
    if options.document:
        command = f"./run bench speed{' --full' if options.full else ''} --document"
        path = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
        Markers.of("./run bench speed").write(path, f"`{command}`:\n\n" + "\n".join(lines) + "\n")
    return all(row.is_met or not row.values for row in rows)


def _interleaved(repeats: int, first: Callable[[], float], second: Callable[[], float]) -> list[float]:
    """Seconds of `first` over those of `second`, run in turn; one more round before them warms up."""
    ratios = []
    for index in range(repeats + 1):
        gc.collect()
        over, under = first(), second()
        if index:
            ratios.append(over / under)
    return ratios


def _texts(loaded: LoadedModel, length: int | None = None) -> Texts:
    """The default prompts, or one of `length` tokens, with their continuations."""
    encode = encoder(loaded.tokenizer)
    prompts = {name: list(ids) for name, ids in default_prompts(encode, None).items()}
    if length is not None:
        longest = max(prompts.values(), key=len)
        prompts = {"long": (longest * (length // len(longest) + 1))[:length]}
    with HFEngine(loaded.model) as engine:
        return {name: (ids, list(continue_greedily(engine, ids, SPAN))) for name, ids in prompts.items()}


@torch.no_grad()
def bare(model: Any, texts: Texts, rungs: Iterable[str]) -> float:
    """Seconds of the passes that a comparison of prefill and decode needs, at each precision, and of nothing else: all
    tokens at once, then the prompt and a step for each further token."""
    spent = 0.0
    for rung in rungs:
        native = next(model.parameters()).dtype == DTYPES[rung]
        at: AbstractContextManager[None] = nullcontext() if native else at_dtype(model, DTYPES[rung])
        with at:
            began = time.perf_counter()
            for prompt, more in texts.values():
                _call(model, [*prompt, *more], DynamicCache(config=model.config), SPAN + 1)
                cache = DynamicCache(config=model.config)
                _call(model, prompt, cache, 1)
                for token in more:
                    _call(model, [token], cache, 1)
            spent += time.perf_counter() - began
    return spent


def _call(model: Any, tokens: Sequence[int], cache: DynamicCache, keep: int) -> None:
    model(torch.tensor([list(tokens)]), past_key_values=cache, use_cache=True, logits_to_keep=keep)


def _timed(action: Callable[[], object]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def _audit(loaded: LoadedModel, ladder: LadderChoice = "model", texts: Texts | None = None) -> Callable[[], float]:
    """A timed audit with its report, traces and all."""
    prompts = None if texts is None else {name: ids for name, (ids, _) in texts.items()}

    def audit() -> float:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            return _timed(
                lambda: kvdrift.audit(
                    loaded.model, loaded.tokenizer, prompts=prompts, span=SPAN, out=out, ladder=ladder
                )
            )

    return audit


def _audits(repeats: int) -> list[Row]:
    loaded = demo()
    texts = _texts(loaded)
    native = str(loaded.model.dtype).removeprefix("torch.")
    model = _interleaved(repeats, _audit(loaded), lambda: bare(loaded.model, texts, (native, "float64")))
    off = _interleaved(repeats, _audit(loaded, "off"), lambda: bare(loaded.model, texts, (native,)))
    layer = _interleaved(repeats, _audit(loaded, "layer"), _audit(loaded))
    return [
        Row("default audit, ladder on", "wall / bare passes at native and float64", 1.6, model),
        Row("default audit, `--ladder off`", "wall / bare native passes", 1.5, off),
        Row("default audit, `--ladder layer`", "wall / that of `--ladder model`", 2.0, layer),
    ]


def _captures(repeats: int) -> list[Row]:
    """Capture of both passes at all sites, against the passes alone and against hooks that save what they see."""
    loaded = demo()
    texts = _texts(loaded)
    native = str(loaded.model.dtype).removeprefix("torch.")
    captured, plain, saved = [], [], []
    for _ in range(repeats + 1):
        with HFEngine(loaded.model) as engine:
            captured.append(_timed(partial(_capture, engine, texts)))
        plain.append(bare(loaded.model, texts, (native,)))
        saved.append(_save_by_hooks(loaded.model, texts, native))
    pairs = list(zip(captured, plain, saved, strict=True))[1:]
    return [
        Row("capture alone, all sites, both passes", "wall / bare native passes", 1.2, [c / p for c, p, _ in pairs]),
        Row(
            "the same",
            "times as fast as torch hooks that save .pt",
            3.0,
            [s / c for c, _, s in pairs],
            at_least=True,
            note="the hooks save what modules give, no scores and no cache",
        ),
    ]


def _capture(engine: HFEngine, texts: Texts) -> None:
    rung = engine.info.dtype
    for name, (prompt, more) in texts.items():
        tokens = (*prompt, *more)
        probed = tuple(range(len(prompt), len(tokens)))
        prefill, decode = (Trace(name, kind, "bench", rung, tokens) for kind in ("prefill", "decode"))
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(tokens, probe=probed, sink=prefill)
        sequence.close()
        sequence = engine.new_sequence(len(tokens))
        sequence.extend(prompt)
        for position, token in zip(probed, more, strict=True):
            sequence.extend([token], probe=(position,), sink=decode)
        sequence.close()


def _save_by_hooks(model: Any, texts: Texts, native: str) -> float:
    """Seconds of the same passes with a hook on every module, each call saved as one file, and bare time included."""
    with tempfile.TemporaryDirectory() as folder:
        count = 0

        def keep(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, output: Any) -> None:
                nonlocal count
                value = output[0] if isinstance(output, tuple) else output
                if isinstance(value, torch.Tensor):
                    count += 1
                    torch.save(value.detach().clone(), Path(folder) / f"{count}-{name}.pt")

            return hook

        handles = [module.register_forward_hook(keep(name)) for name, module in model.named_modules() if name]
        try:
            return bare(model, texts, (native,))
        finally:
            for handle in handles:
                handle.remove()


def _judging(repeats: int) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        seconds = judging.seconds_a_gb(Path(folder) / "run", repeats)
        spent, _ = judging.two_million(Path(folder) / "traces")
    what = "judge, two million pairs"
    return [
        Row("judge, traces of the default audit", "processor time for each GB", 3.0, seconds, " s"),
        Row(what, "processor time", judging.PAIRS_SECONDS, [spent.processor], " s"),
        Row(what, "peak memory", judging.PAIRS_MB, [spent.peak_mb], " MB"),
    ]


def _starts(repeats: int) -> list[Row]:
    help_text = [*judging.KVDRIFT, "--help"]
    code = "import sys, kvdrift; sys.exit('torch' in sys.modules)"
    commands = {"`kvdrift --help`": help_text, "`import kvdrift`": ["-c", code]}
    rows = []
    for what, command in commands.items():
        times = []
        for _ in range(2 * repeats + 1):
            began = time.perf_counter()
            subprocess.run([sys.executable, *command], check=True, stdout=subprocess.DEVNULL)
            times.append(time.perf_counter() - began)
        rows.append(Row(what, "wall, a new process without torch", _LIMIT_IMPORT_S, times, " s"))
    return rows


# ---------------------------------------------------------------------------------------------------------- the full


def _left_out() -> list[Row]:
    why = "takes --full"
    return [
        Row(f"audit at {_LONG} tokens, span {SPAN}", "wall / bare passes", 1.3, note=why),
        Row(f"audit at {_LONG} tokens, span {SPAN}", "peak above that of the bare passes", 200.0, (), " MB", note=why),
        Row("how cost grows with layers", "exponent", 1.1, note=why),
        Row("how cost grows with prompts", "exponent", 1.1, note=why),
        Row("how cost grows with tokens", "exponent over that of the model", 1.0, note=why),
        Row("1.1 B random Llama, `--ladder layer`", "peak above the model / a layer at float64", 1.1, note=why),
        Row("`--scenario all`", f"wall / {TODAY_ALL_S:.0f} s", 0.5, note=why),
    ]


def _full() -> list[Row]:
    return [*_long(), *_growth(), _big(), _all_scenarios()]


def _long() -> list[Row]:
    """The longest prompt that the model takes, in processes of their own, since what is freed hides what is taken."""
    audit, plain = (_own_process(f"long_{kind}()") for kind in ("audit", "bare"))
    what = f"audit at {_LONG} tokens, span {SPAN}"
    above = audit[1] - plain[1]
    return [
        Row(what, "wall / bare passes at native and float64", 1.3, [audit[0] / plain[0]]),
        Row(what, "peak above that of the bare passes", 200.0, [above], " MB"),
    ]


def _own_process(call: str) -> tuple[float, float]:
    """Call a function of this module in a process of its own, and return the two figures that it prints last."""
    code = f"from benchmarks import speed; print(*speed.{call})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    first, second = (float(figure) for figure in done.stdout.split()[-2:])
    return first, second


def long_audit() -> tuple[float, float]:
    """Seconds and peak memory (MB) of an audit at the longest prompt."""
    loaded = demo()
    texts = _texts(loaded, _LONG)
    with cost.peak_memory() as peak:
        spent = _audit(loaded, texts=texts)()
    return spent, peak[0]


def long_bare() -> tuple[float, float]:
    """Seconds and peak memory (MB) of the bare passes at the longest prompt."""
    loaded = demo()
    texts = _texts(loaded, _LONG)
    native = str(loaded.model.dtype).removeprefix("torch.")
    with cost.peak_memory() as peak:
        spent = bare(loaded.model, texts, (native, "float64"))
    return spent, peak[0]


def _growth() -> list[Row]:
    """Exponents of growth, fitted in log and log; small random models, so that a whole series takes a minute."""
    layers = [2, 4, 8, 16, 30]
    by_layer = [_small(n, 32, 2) for n in layers]
    prompts = [1, 4, 16, 64]
    by_prompt = [_small(2, 32, n) for n in prompts]
    tokens = [512, 1024, 2048, 4096]
    by_token = [_small(2, n, 1) for n in tokens]
    over = _exponent(tokens, [a for a, _ in by_token]) - _exponent(tokens, [b for _, b in by_token])
    return [
        Row(
            "how cost grows with layers",
            f"exponent, {layers} layers",
            1.1,
            [_exponent(layers, [a for a, _ in by_layer])],
        ),
        Row(
            "how cost grows with prompts", f"exponent, {prompts}", 1.1, [_exponent(prompts, [a for a, _ in by_prompt])]
        ),
        Row("how cost grows with tokens", f"exponent over that of the model, {tokens}", 0.1, [over]),
    ]


def _exponent(sizes: Sequence[int], seconds: Sequence[float]) -> float:
    return float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])


def _small(n_layers: int, n_tokens: int, n_prompts: int) -> tuple[float, float]:
    """Seconds of an audit of a random model, and of its bare passes."""
    model = cost.random_llama(n_layers, hidden=128, intermediate=512, positions=8192)
    rng = np.random.default_rng(0)
    texts: Texts = {
        f"p{number}": (rng.integers(1, 500, n_tokens).tolist(), rng.integers(1, 500, SPAN).tolist())
        for number in range(n_prompts)
    }
    loaded = LoadedModel(model=model, tokenizer=None, name="random")
    return min(_audit(loaded, texts=texts)() for _ in range(2)), bare(model, texts, ("bfloat16", "float64"))


def _big() -> Row:
    above, layer = _own_process("big_model()")
    plain, _ = _own_process("big_model(bare_only=True)")
    return Row(
        "1.1 B random Llama, `--ladder layer`",
        "peak above the model / a layer at float64",
        1.1,
        [above / layer],
        note=f"{above:.0f} MB, a layer is {layer:.0f} MB, and bare native passes take {plain:.0f} MB themselves",
    )


def big_model(*, bare_only: bool = False) -> tuple[float, float]:
    """Peak memory above a model of the size of TinyLlama, audited by layer or run bare at its native precision, and one
    layer at float64, in MB."""
    model = cost.random_llama(22, hidden=2048, intermediate=5632, positions=2048, vocab=32000, heads=32, kv_heads=4)
    layer = sum(p.numel() for p in model.model.layers[0].parameters()) * 8 / 1e6
    say(f"a model of {bytes_of(model) / 1e6:.0f} MB")
    prompt = list(range(3, 19))
    small = cost.random_llama(2, hidden=64, intermediate=64)  # what is imported on the way is not the model's
    kvdrift.audit(small, prompts={"a": prompt}, span=2, ladder="layer")
    cost.give_back_freed_memory()
    before = cost.resident_mb()
    with cost.peak_memory() as peak:
        if bare_only:
            bare(model, {"a": (prompt, [5, 6])}, ("bfloat16",))
        else:
            kvdrift.audit(model, prompts={"a": prompt}, span=2, ladder="layer")
    return peak[0] - before, layer


def _all_scenarios() -> Row:
    loaded = demo()
    began = time.perf_counter()
    audit = kvdrift.audit(loaded.model, loaded.tokenizer, scenarios="all")
    spent, passes = time.perf_counter() - began, audit.view["forward_passes"]
    note = f"{spent:.0f} s; {passes['made']} forward passes made, {passes['saved']} saved"
    return Row("`--scenario all`", f"wall / {TODAY_ALL_S:.0f} s", 0.5, [spent / TODAY_ALL_S], note=note)
