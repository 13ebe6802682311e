"""How long `import kvdrift` takes, and that it loads no engine."""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys

from benchmarks.support import say

LIMIT_S = 0.3
_CODE = "import time; t = time.perf_counter(); import kvdrift; print(time.perf_counter() - t)"


def run(options: argparse.Namespace) -> bool:
    """Import in fresh interpreters; the median counts."""
    times = [
        float(subprocess.run([sys.executable, "-c", _CODE], capture_output=True, text=True, check=True).stdout)
        for _ in range(2 * options.repeats + 1)
    ]
    median = statistics.median(times)
    say(f"import kvdrift: median {median:.3f} s of {len(times)} (limit {LIMIT_S} s)")
    return median < LIMIT_S
