"""The rows of `./run bench speed` that take many minutes: long prompts, growth, large models, large traces."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import accelerate
import numpy as np

import kvdrift
from benchmarks import cost, judging
from benchmarks.passes import SPAN, Texts, audit_of, bare, native_of, texts_of
from benchmarks.support import bytes_of, demo, say
from benchmarks.table import Row, interleaved, timed
from kvdrift.engines.hf.load import LoadedModel

TODAY_ALL_S = 272.0  # `--scenario all` on SmolLM2 before prefills were shared further
_LONG = 8000
_SPARSE_PROMPTS = 286  # of 0.14 GB each

LONG_ROWS = (
    Row(f"audit at {_LONG} tokens, span {SPAN}", "processor time / bare passes at native and float64", 1.3),
    Row(f"audit at {_LONG} tokens, span {SPAN}", "peak above that of the bare passes", 200.0, (), " MB"),
)
GROWTH_ROWS = (
    Row("how cost grows with layers", "exponent, 2 to 30 layers", 1.1),
    Row("how cost grows with prompts", "exponent, 1 to 64 prompts", 1.1),
    Row("how cost grows with tokens", "exponent over that of the model, 512 to 4,096 tokens", 0.1),
)
BIG_ROWS = (Row("1.1 B random Llama, `--ladder layer`", "peak above the model / a layer at float64", 1.1),)
SPARSE_ROWS = (Row("judge, 40 GB of traces in files with holes", "peak memory", judging.STREAM_MB, (), " MB"),)
OFFLOAD_ROWS = (
    Row("a model whose weights are offloaded, `--ladder layer`", "processor time / that of `--ladder model`", 2.0),
)
SCENARIO_ROWS = (Row("`--scenario all`", f"processor time / {TODAY_ALL_S:.0f} s", 0.5),)


def _with(row: Row, values: Sequence[float], note: str = "") -> Row:
    return Row(row.what, row.measure, row.limit, values, row.unit, row.at_least, note)


def own_process(call: str) -> tuple[float, float]:
    """Call a function of this module in a process of its own, and return the two figures that it prints last."""
    code = f"from benchmarks import large; print(*large.{call})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    first, second = (float(figure) for figure in done.stdout.split()[-2:])
    return first, second


def long(repeats: int) -> list[Row]:
    """The longest prompt that the model takes, in processes of their own, since what is freed hides what is taken."""
    audit, plain = (own_process(f"long_{kind}()") for kind in ("audit", "bare"))
    note = f"{audit[0]:.0f} s and {audit[1]:.0f} MB; the bare passes {plain[0]:.0f} s and {plain[1]:.0f} MB"
    first, second = LONG_ROWS
    return [_with(first, [audit[0] / plain[0]], note), _with(second, [audit[1] - plain[1]])]


def long_audit() -> tuple[float, float]:
    """Seconds of the processor and peak memory (MB) of an audit at the longest prompt."""
    loaded = demo()
    texts = texts_of(loaded, _LONG)
    with cost.peak_memory() as peak:
        spent = audit_of(loaded, texts=texts)()
    return spent, peak[0]


def long_bare() -> tuple[float, float]:
    """Seconds of the processor and peak memory (MB) of the bare passes at the longest prompt."""
    loaded = demo()
    texts = texts_of(loaded, _LONG)
    with cost.peak_memory() as peak:
        spent = bare(loaded.model, texts, (native_of(loaded.model), "float64"))
    return spent, peak[0]


def growth(repeats: int) -> list[Row]:
    """Exponents of growth, fitted in log and log; small random models, so that a whole series takes a minute."""
    layers, prompts, tokens = [2, 4, 8, 16, 30], [1, 4, 16, 64], [512, 1024, 2048, 4096]
    by_layer = [_small(n, 32, 2) for n in layers]
    by_prompt = [_small(2, 32, n) for n in prompts]
    by_token = [_small(2, n, 1) for n in tokens]
    over = _exponent(tokens, [a for a, _ in by_token]) - _exponent(tokens, [b for _, b in by_token])
    found = (_exponent(layers, [a for a, _ in by_layer]), _exponent(prompts, [a for a, _ in by_prompt]), over)
    return [_with(row, [value]) for row, value in zip(GROWTH_ROWS, found, strict=True)]


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
    return min(audit_of(loaded, texts=texts)() for _ in range(2)), bare(model, texts, ("bfloat16", "float64"))


def big(repeats: int) -> list[Row]:
    """The peak of an audit by layer of a model whose layer at float64 is a third of a GB."""
    above, layer = own_process("big_model()")
    plain, _ = own_process("big_model(bare_only=True)")
    note = f"{above:.0f} MB, a layer is {layer:.0f} MB, and bare native passes take {plain:.0f} MB themselves"
    return [_with(BIG_ROWS[0], [above / layer], note)]


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


def sparse(repeats: int) -> list[Row]:
    """The peak of judging files with holes; a row of each tensor drifts, so that all of it is computed on."""
    with tempfile.TemporaryDirectory() as folder:
        return [_with(SPARSE_ROWS[0], [judging.streamed(Path(folder) / "traces", _SPARSE_PROMPTS)])]


def offload(repeats: int) -> list[Row]:
    """A model of which all weights lie on a disk, and come one module at a time, audited by layer and as a whole."""
    with tempfile.TemporaryDirectory() as folder:
        model: Any = cost.random_llama(8, hidden=512, intermediate=2048)
        accelerate.disk_offload(model, folder, execution_device="cpu")
        rng = np.random.default_rng(0)
        prompts = {name: rng.integers(1, 500, 32).tolist() for name in "ab"}

        def audit(ladder: Any) -> float:
            return timed(lambda: kvdrift.audit(model, prompts=prompts, span=SPAN, ladder=ladder))

        return [_with(OFFLOAD_ROWS[0], interleaved(repeats, lambda: audit("layer"), lambda: audit("model")))]


def scenarios(repeats: int) -> list[Row]:
    """Every scenario on the embedded model, once."""
    loaded = demo()
    began, wall = time.process_time(), time.perf_counter()
    audit = kvdrift.audit(loaded.model, loaded.tokenizer, scenarios="all")
    spent, wall, passes = time.process_time() - began, time.perf_counter() - wall, audit.view["forward_passes"]
    note = (
        f"{spent:.0f} s, {wall:.0f} by the clock; {passes['made']} forward passes made, {passes['saved']} saved "
        f"({audit.verdict})"
    )
    return [_with(SCENARIO_ROWS[0], [spent / TODAY_ALL_S], note)]
