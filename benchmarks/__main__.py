"""Runs the benchmarks named on the command line, all of them by default, and prints their figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

from benchmarks import accuracy, cost, start_up

BENCHMARKS: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {
    "import": (start_up.run, "time of `import kvdrift` and what it loads"),
    "cost": (cost.run_time, "time of the default audit over its bare forward passes"),
    "memory": (cost.run_memory, "memory of the native passes above the model"),
    "clean": (accuracy.run_clean, "SmolLM2 clean: 20 prompts at bf16, fp16, fp32 x eager, sdpa"),
    "faults": (accuracy.run_faults, "SmolLM2 with every planted fault, at bf16, fp16, fp32 x eager, sdpa"),
}


def main() -> int:
    """Run, print, and return 1 if a promised figure was missed."""
    parser = argparse.ArgumentParser(
        prog="./run bench",
        description="Measure kvdrift: " + "; ".join(f"{name}: {text}" for name, (_, text) in BENCHMARKS.items()),
        epilog="example: ./run bench cost memory --repeats 3",
    )
    parser.add_argument("names", nargs="*", default=list(BENCHMARKS), help=", ".join(BENCHMARKS))
    parser.add_argument("--repeats", type=int, default=3, help="runs of each timing (the median ratio counts)")
    parser.add_argument("--prompts", type=int, default=20, help="prompts of the clean runs")
    parser.add_argument("--dtypes", default="bfloat16,float16,float32")
    parser.add_argument("--attn", default="sdpa,eager")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"unknown benchmark {unknown[0]!r}; known: {', '.join(BENCHMARKS)}")
    missed = [name for name in options.names if not _run(name, options)]
    if missed:
        sys.stdout.write(f"\nmissed: {', '.join(missed)}\n")
    return 1 if missed else 0


def _run(name: str, options: argparse.Namespace) -> bool:
    sys.stdout.write(f"\n## {name}: {BENCHMARKS[name][1]}\n")
    sys.stdout.flush()
    return BENCHMARKS[name][0](options)


if __name__ == "__main__":
    sys.exit(main())
