"""Runs the benchmarks named on the command line, all of them by default, and prints their figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path

from benchmarks.support import SAID
from kvdrift.engines.hf.quiet import quiet_imports
from kvdrift.errors import KvdriftError
from kvdrift_bench.figures.markers import Markers

# Each with the function that runs it, whose module is imported then: most import torch.
BENCHMARKS: dict[str, tuple[str, str]] = {
    "import": ("start_up.run", "time of `import kvdrift` and what it loads"),
    "cost": ("cost.run_time", "time of the default audit over its bare forward passes"),
    "memory": ("cost.run_memory", "memory of the native passes above the model"),
    "judging": (
        "judging.run",
        "time a GB of judging recorded traces; time and memory of two million pairs; memory by size",
    ),
    "scenarios": ("scenarios.run", "time of `--scenario all`, forward passes made and spared"),
    "clean": ("accuracy.run_clean", "false alarms of clean audits, each on other prompts"),
    "faults": ("accuracy.run_faults", "the fault corpus, as `kvdrift-bench faults`; fills its document in docs/"),
    "cells": ("cells.run", "10,000 empty cells of a sweep: what a backend costs a cell"),
    "growth": ("growth.run", "by how much operations of llama.cpp enlarge differences of their inputs"),
    "speed": (
        "speed.run",
        "every goal of time and size as a ratio within one run; long ones with --full; only by name",
    ),
    "pages": (
        "pages.run",
        "report.html of 100 layers, 1,000 positions: time to make, size, time to draw; only by name",
    ),
    "fuzz": (
        "fuzz.run",
        "broken files for every reader, --seconds each; what breaks one is kept in build/fuzz; only by name",
    ),
    "kills": (
        "kills.run",
        "audits, judgements and sweeps killed at --moments by chance each: what is left is whole; only by name",
    ),
    "engines": (
        "engines.run",
        "engines that others wrote, clean, with a stale slot and a shifted position; installs them, so only by name",
    ),
    "servers": ("servers.run", "audits of a clean vLLM and llama-cpp-python server; installs vLLM, so only by name"),
}

_BY_NAME = ("speed", "pages", "fuzz", "kills", "servers", "engines")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options that `arguments` name, those of the process by default; wrong ones end the process."""
    parser = argparse.ArgumentParser(
        prog="./run bench",
        description="Measure kvdrift: " + "; ".join(f"{name}: {text}" for name, (_, text) in BENCHMARKS.items()),
        epilog="example: ./run bench cost memory --repeats 3",
    )
    parser.add_argument(
        "names", nargs="*", default=[name for name in BENCHMARKS if name not in _BY_NAME], help=", ".join(BENCHMARKS)
    )
    parser.add_argument("--repeats", type=int, default=3, help="runs of each timing (the median ratio counts)")
    parser.add_argument("--document", action="store_true", help="put the figures into docs/performance.md")
    parser.add_argument(
        "--full", action="store_true", help="judging and speed: the rows that take many minutes as well"
    )
    parser.add_argument("--pieces", help="speed: the pieces to measure, with commas, instead of all of them")
    parser.add_argument("--fresh", action="store_true", help="speed: measure again what was kept of an earlier run")
    parser.add_argument("--seconds", type=float, default=600.0, help="fuzz: time for each reader")
    parser.add_argument("--seed", type=int, default=0, help="fuzz and kills: where chance begins")
    parser.add_argument("--moments", type=int, default=50, help="kills: how often each command is killed")
    corpus = parser.add_argument_group("clean and faults", "the options of `kvdrift-bench faults`")
    corpus.add_argument("--engine", default="hf", help="hf or llamacpp: where the faults are planted")
    corpus.add_argument("--model", action="append", help="default, tiny:llama ... or what an audit takes; repeatable")
    corpus.add_argument("--dtype", default="bfloat16,float16,float32", help="hf: native dtypes, with commas")
    corpus.add_argument("--attn", default="sdpa,eager", help="hf: attention implementations, with commas")
    corpus.add_argument(
        "--weights", default="file", help="llamacpp: types of the weights, with commas; file: as they are"
    )
    corpus.add_argument("--kv-type", default="f16,q8_0", help="llamacpp: types of K and V, with commas")
    corpus.add_argument("--flash-attn", default="off,on", help="llamacpp: off, on, or both with a comma")
    corpus.add_argument("--faults", help="names of faults, with commas; all of them by default")
    corpus.add_argument("--twins", action=argparse.BooleanOptionalAction, default=True, help="run the clean twins too")
    corpus.add_argument("--clean", type=int, default=20, help="clean runs in each setting")
    corpus.add_argument("--ladder", default="both", help="model, off or both")
    corpus.add_argument("--out", type=Path, help="lines of JSON; what it holds already is not run again")
    corpus.add_argument("--markdown", type=Path, help="the document to fill")
    corpus.add_argument("--json", type=Path, help="the figures as JSON")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(BENCHMARKS)}")
    return options


def main() -> int:
    """Run, print, and return 1 if a promised figure was missed."""
    options = parse()
    try:
        missed = [name for name in options.names if not _run(name, options)]
    except KvdriftError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    if options.document and options.names not in (["speed"], ["pages"]):
        _fill_document(options.names)
    if missed:
        sys.stdout.write(f"\nmissed: {', '.join(missed)}\n")
    return 1 if missed else 0


def _run(name: str, options: argparse.Namespace) -> bool:
    sys.stdout.write(f"\n## {name}: {BENCHMARKS[name][1]}\n")
    sys.stdout.flush()
    module, _, function = BENCHMARKS[name][0].partition(".")
    with quiet_imports():
        run: Callable[[argparse.Namespace], bool] = getattr(import_module(f"benchmarks.{module}"), function)
    return run(options)


def _fill_document(names: list[str]) -> None:
    """Write what was said, and the command that said it, between the markers of docs/performance.md."""
    path = Path(__file__).resolve().parents[1] / "docs" / "performance.md"
    lines = "\n".join(f"    {line}" for line in SAID)
    Markers.of("./run bench").write(path, f"`./run bench {' '.join(names)} --document`:\n\n{lines}\n")


if __name__ == "__main__":
    sys.exit(main())
