"""What judging recorded traces costs: seconds a GB, time and memory of two million pairs, and memory by size."""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

import kvdrift
from benchmarks.big_traces import Shape, write_big
from benchmarks.support import demo, say
from kvdrift.trace.writer import Writer

SECONDS_A_GB = 3.0
PAIRS_SECONDS, PAIRS_MB = 60.0, 1000.0
# Peak of the process, mapped pages of files among it, however large the directory is.
STREAM_MB, STREAM_GROWTH = 512.0, 1.25
STREAM_PROMPTS, STREAM_PROMPTS_FULL = (2, 8), (75,)
STREAM = Shape(n_tokens=512, n_positions=8)
N_LAYERS, N_PROMPTS, N_POSITIONS, WIDTH = 80, 10, 166, 64
KVDRIFT = ("-c", "from kvdrift.cli.app import main; main()")
SITES = (
    "layer_in",
    "attn_norm_out",
    "q_proj",
    "k_proj",
    "v_proj",
    "q_norm",
    "k_norm",
    "q_rope",
    "k_rope",
    "attn_ctx",
    "attn_out",
    "resid_attn",
    "ffn_norm_out",
    "mlp_out",
    "layer_out",
)


class Spent(NamedTuple):
    """What a finished process took."""

    wall: float
    processor: float
    peak_mb: float


def run(options: argparse.Namespace) -> bool:
    """Judge the traces of the default audit, a directory of two million pairs, and directories of growing size, up to
    10 GB with --full; the processor's time counts."""
    with tempfile.TemporaryDirectory() as folder:
        return all(
            [
                _default(Path(folder) / "run", options.repeats),
                _pairs(Path(folder) / "traces"),
                _growing(Path(folder) / "growing", options.full),
            ]
        )


def _default(folder: Path, repeats: int) -> bool:
    found = seconds_a_gb(folder, repeats)
    return statistics.median(found) <= SECONDS_A_GB


def seconds_a_gb(folder: Path, repeats: int) -> list[float]:
    """Processor seconds for each GB of judging the traces of the default audit, above what imports take."""
    loaded = demo()
    kvdrift.audit(loaded.model, loaded.tokenizer, out=folder)
    size = sum(path.stat().st_size for path in (folder / "traces").rglob("*.safetensors")) / 1e9
    bare = statistics.median(_python("-c", "import kvdrift.pipeline.judge").processor for _ in range(repeats))
    found = [_python(*KVDRIFT, "judge", str(folder)).processor - bare for _ in range(repeats)]
    median = statistics.median(found)
    say(
        f"judging {size * 1000:.0f} MB of traces of the default audit: {median:.2f} s of the processor above the "
        f"{bare:.2f} s that imports take, {min(found):.2f} to {max(found):.2f} in {repeats} runs; "
        f"{median / size:.1f} s/GB (limit {SECONDS_A_GB})"
    )
    return [seconds / size for seconds in found]


def _pairs(folder: Path) -> bool:
    spent, _ = two_million(folder)
    return spent.processor <= PAIRS_SECONDS and spent.peak_mb <= PAIRS_MB


def two_million(folder: Path) -> tuple[Spent, int]:
    """What judging two million pairs takes, and how many they are."""
    n_pairs = write_pairs(folder)
    spent = _python(*KVDRIFT, "judge", str(folder), "--scope", "sampled")
    say(
        f"judging {n_pairs / 1e6:.2f} million pairs: {spent.processor:.1f} s of the processor, {spent.wall:.1f} s by "
        f"the clock (limit {PAIRS_SECONDS:.0f} s), {spent.peak_mb:.0f} MB at most (limit {PAIRS_MB:.0f} MB)"
    )
    return spent, n_pairs


def _growing(folder: Path, full: bool) -> bool:
    peaks = [streamed(folder, n) for n in (*STREAM_PROMPTS, *(STREAM_PROMPTS_FULL if full else ()))]
    # The drift table has a row for each pair, which is a hundredth of what was recorded of it.
    return max(peaks) <= STREAM_MB and peaks[1] <= STREAM_GROWTH * peaks[0]


def streamed(folder: Path, n_prompts: int) -> float:
    """The peak, in MB, of judging traces of so many prompts, each of which is 0.14 GB."""
    size = write_big(folder, STREAM, n_prompts)
    spent = _python(*KVDRIFT, "judge", str(folder))
    shutil.rmtree(folder)
    say(
        f"judging {size / 1e9:.2f} GB of traces of {n_prompts} prompts: {spent.peak_mb:.0f} MB at most, mapped pages "
        f"of files among them (limit {STREAM_MB:.0f} MB), {spent.processor:.0f} s of the processor"
    )
    return spent.peak_mb


def write_pairs(
    folder: Path, *, n_layers: int = N_LAYERS, n_prompts: int = N_PROMPTS, n_positions: int = N_POSITIONS
) -> int:
    """Write bfloat16 rows that drift from layer 1 on, and return how many pairs they make."""
    writer = Writer(folder, engine="bench", model="random rows", dtype="bfloat16", n_layers=n_layers)
    rng = np.random.default_rng(0)
    positions = range(8, 8 + n_positions)
    for number in range(n_prompts):
        tokens = rng.integers(0, 1000, 8 + n_positions).tolist()
        rows = rng.standard_normal((n_positions, WIDTH)).astype(np.float32)
        for seed, begin in enumerate((writer.prefill, writer.decode)):
            noise = np.random.default_rng(seed)
            with begin(f"p{number}", tokens) as trace:
                if begin == writer.prefill:
                    trace.call(0, len(tokens), 0)
                else:
                    trace.call(0, 8, 0)
                    for position in positions:
                        trace.call(position, 1, position)
                trace.rows("embed_out", rows.astype(ml_dtypes.bfloat16), positions=positions)
                for layer in range(n_layers):
                    for site in SITES:
                        values = _rounded(rows, noise) if layer else rows.astype(ml_dtypes.bfloat16)
                        trace.rows(site, values, positions=positions, layer=layer)
                trace.rows("logits", _rounded(rows, noise), positions=positions)
    writer.finish()
    return n_prompts * n_positions * (n_layers * len(SITES) + 2)


def _rounded(rows: NDArray[np.float32], rng: np.random.Generator) -> NDArray[np.generic]:
    """The rows off by about one rounding of bfloat16."""
    return (rows * (1.0 + 2.0**-9 * rng.standard_normal(rows.shape))).astype(ml_dtypes.bfloat16)


# A process of its own between this one and the measured one: what a process holds when it starts another counts as the
# other's peak too, and this one has had a model.
_LAUNCH = """
import os, subprocess, sys, time
began = time.perf_counter()
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
_, _, used = os.wait4(process.pid, 0)
print(time.perf_counter() - began, used.ru_utime + used.ru_stime, used.ru_maxrss / 1000)
"""


def _python(*arguments: str) -> Spent:
    return python_of({}, *arguments)


def python_of(surroundings: Mapping[str, str], *arguments: str) -> Spent:
    """Run Python in a process of its own, on one core; what it says is dropped, and a failure is not looked at."""
    done = subprocess.run(
        [sys.executable, "-c", _LAUNCH, sys.executable, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", **surroundings},
    )
    return Spent(*(float(figure) for figure in done.stdout.split()))
