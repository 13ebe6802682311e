"""What an audit costs: its time over that of the forward passes that it needs, and its memory above the model."""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvdrift
from benchmarks.support import bytes_of, demo, say
from kvdrift.capture.modes import capture_prompt, continue_greedily
from kvdrift.capture.prompts import default_prompts
from kvdrift.engines.encode import encoder
from kvdrift.engines.hf.engine import HFEngine
from kvdrift.engines.hf.load import LoadedModel
from kvdrift.engines.torch.precision import DTYPES, at_dtype
from kvdrift.vocabulary.facts import Prompt
from kvdrift.vocabulary.plan import AuditPlan, LadderChoice, Mode

TIME_LIMIT = 4.0
MEMORY_LIMIT_MB = 300.0
SPAN = 4
DEPTHS = (4, 32)  # layers
LADDERS: tuple[LadderChoice, ...] = ("model", "layer", "off")


def run_time(options: argparse.Namespace) -> bool:
    """Time the default audit, report and traces written, against bare forward passes, then the other ladders."""
    loaded = demo()
    encode = encoder(loaded.tokenizer)
    prompts = {name: list(ids) for name, ids in default_prompts(encode, None).items()}
    ratios = []
    for index in range(options.repeats + 1):
        bare = _bare(loaded.model, prompts)
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            kvdrift.audit(loaded.model, loaded.tokenizer, out=Path(folder) / "run")
            audit = time.perf_counter() - began
            others = {kind: _audit_time(loaded, kind) for kind in LADDERS if kind != AuditPlan().ladder}
        if index:  # the first round warms up
            ratios.append(audit / bare)
            say(f"audit {audit:.2f} s, bare forward passes {bare:.2f} s, ratio {audit / bare:.2f}")
            say("; ".join(f"--ladder {kind} {spent:.2f} s" for kind, spent in others.items()))
    median = statistics.median(ratios)
    say(f"median ratio {median:.2f} (limit {TIME_LIMIT})")
    return median <= TIME_LIMIT


def _audit_time(loaded: LoadedModel, ladder: LadderChoice) -> float:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        kvdrift.audit(loaded.model, loaded.tokenizer, out=Path(folder) / "run", ladder=ladder)
        return time.perf_counter() - began


@torch.no_grad()
def _bare(model: Any, prompts: dict[str, list[int]]) -> float:
    """Seconds of the forward calls of the default audit and of nothing else, same tokens and dtypes."""
    spent = 0.0
    native = next(model.parameters()).dtype
    continuations = {}
    for name, ids in prompts.items():
        tokens = list(ids)
        cache = DynamicCache(config=model.config)
        fed = tokens
        for _ in range(SPAN):
            seconds, logits = _forward(model, fed, cache, 1)
            spent += seconds
            fed = [int(logits[0, -1].argmax())]
            tokens += fed
        continuations[name] = tokens
    for dtype in dict.fromkeys([native, DTYPES["float32"], DTYPES["float64"]]):
        with at_dtype(model, dtype):
            for name, ids in prompts.items():
                tokens = continuations[name]
                full = DynamicCache(config=model.config)
                spent += _forward(model, tokens, full, SPAN + 1)[0]
                cache = DynamicCache(config=model.config)
                spent += _forward(model, ids, cache, 1)[0]
                for token in tokens[len(ids) :]:
                    spent += _forward(model, [token], cache, 1)[0]
                for token in reversed(tokens[len(ids) :]):
                    full.crop(-1)
                    spent += _forward(model, [token], full, 1)[0]
                    full.crop(-1)
    return spent


def _forward(model: Any, tokens: list[int], cache: DynamicCache, keep: int) -> tuple[float, torch.Tensor]:
    ids = torch.tensor([tokens])
    began = time.perf_counter()
    logits = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=keep).logits
    return time.perf_counter() - began, logits


def run_memory(options: argparse.Namespace) -> bool:
    """Measure in processes of their own: one that has freed memory before would take it back unseen."""
    kept = [_in_own_process(f"measure_{what}") for what in ("native()", *(f"audit({k!r})" for k in LADDERS))]
    return all([*kept, _depth_is_free()])


def _in_own_process(call: str) -> bool:
    code = f"import sys; from benchmarks import cost; sys.exit(not cost.{call})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    for line in done.stdout.splitlines():
        say(line)
    return done.returncode == 0


def _depth_is_free() -> bool:
    """Compare two models that differ in the number of layers alone: the deeper one must not take more than a layer."""
    above, layer_mb = {}, math.nan
    for n_layers in DEPTHS:
        code = f"from benchmarks import cost; print(*cost.measure_depth({n_layers}))"
        done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
        above[n_layers], layer_mb = (float(figure) for figure in done.stdout.split()[-2:])
    fewer, more = DEPTHS
    grown = above[more] - above[fewer]
    say(
        f"--ladder layer, layer 0 recorded: {above[fewer]:.0f} MB above a model of {fewer} layers, "
        f"{above[more]:.0f} MB above one of {more} (limit: one layer more, {layer_mb:.0f} MB; the other "
        f"{more - fewer} are {(more - fewer) * layer_mb:.0f} MB at float64)"
    )
    return grown < layer_mb


def measure_depth(n_layers: int) -> tuple[float, float]:
    """Peak memory above a random model of `n_layers` layers, audited by layer, and one layer at float64, in MB.

    One layer is recorded, so that what is recorded is as much whatever the depth.
    """
    model = random_llama(n_layers, hidden=512, intermediate=2048)
    layer_mb = sum(p.numel() for p in model.model.layers[0].parameters()) * 8 / 1e6
    give_back_freed_memory()
    before = resident_mb()
    with peak_memory() as peak:
        kvdrift.audit(model, prompts={"a": list(range(3, 19))}, span=2, layers=(0,), ladder="layer")
    return peak[0] - before, layer_mb


def random_llama(
    n_layers: int,
    *,
    hidden: int,
    intermediate: int,
    positions: int = 2048,
    vocab: int = 512,
    heads: int = 8,
    kv_heads: int = 8,
) -> Any:
    """Return a Llama with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=n_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=positions,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # a large model is never held at float32
    try:
        return LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(before)


def measure_native() -> bool:
    """Peak resident memory of the native passes of the default audit, above the loaded and touched model."""
    loaded, before = _touched()
    encode = encoder(loaded.tokenizer)
    with peak_memory() as peak, HFEngine(loaded.model) as engine:
        for name, ids in default_prompts(encode, None).items():
            prompt = Prompt(name, tuple(ids), continue_greedily(engine, ids, SPAN))
            list(capture_prompt(engine, prompt, list(Mode), engine.info.dtype))
    above = peak[0] - before
    say(f"native passes: {above:.0f} MB above the model (limit {MEMORY_LIMIT_MB:.0f} MB)")
    return above < MEMORY_LIMIT_MB


def measure_audit(ladder: LadderChoice) -> bool:
    """Peak resident memory of the whole default audit with one kind of ladder, above the loaded and touched model.

    One layer at a time has a limit: two layers at float64 (the layer, a block of the head), and the budget of the
    native passes.
    """
    loaded, before = _touched()
    layers = loaded.model.model.layers
    layer_mb = max(sum(p.numel() for p in layer.parameters()) for layer in layers) * 8 / 1e6
    with tempfile.TemporaryDirectory() as folder, peak_memory() as peak:
        kvdrift.audit(loaded.model, loaded.tokenizer, out=Path(folder) / "run", ladder=ladder)
    above = peak[0] - before
    limit = MEMORY_LIMIT_MB + 2 * layer_mb if ladder == "layer" else math.inf
    what = f"limit {limit:.0f} MB; one layer at float64 is {layer_mb:.0f} MB" if ladder == "layer" else "no limit"
    say(f"whole audit, --ladder {ladder}: {above:.0f} MB above the model ({what})")
    return above < limit


def _touched() -> tuple[LoadedModel, float]:
    """The default model with every weight in memory, and what the process holds then."""
    loaded = demo()
    touched = sum(float(p.detach().sum()) for p in loaded.model.parameters())
    give_back_freed_memory()
    say(f"model {bytes_of(loaded.model) / 1e6:.0f} MB (sum of weights {touched:.3g})")
    return loaded, resident_mb()


def give_back_freed_memory() -> None:
    """Return freed heap pages to the system: what loading left behind must not hide what the audit takes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident_mb() -> float:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * 4096 / 1e6


@contextmanager
def peak_memory() -> Iterator[list[float]]:
    """Sample the resident memory while the context is open."""
    peak = [resident_mb()]
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.005):
            peak[0] = max(peak[0], resident_mb())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
