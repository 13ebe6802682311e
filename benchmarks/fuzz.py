"""Broken files for every reader: changed by hypothesis, read in a child process that may take little memory and time.

`benchmarks.broken` says which readers there are and what counts as a finding. Where atheris is installed, half of the
time is steered by what the files reach (`benchmarks.guided`).
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks import guided
from benchmarks.broken import TARGETS, Guard, keep, limit_memory
from benchmarks.support import say

_PATIENCE = 90.0  # seconds behind its time that a child may take to end
_WEIRD = (
    "-1", "0", "1e308", "inf", "nan", "-0.5", "9223372036854775808", "1" * 400, "null", "true", "[]", "{}", '""', "NaN",
    "Infinity", '"../../../../etc/passwd"', '"/etc/passwd"', '"bfloat17"', '"\\u0000"', '"\\ud800"', "[[[[[[]]]]]]",
)  # fmt: skip
_VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|"[^"\\]*"|null|true|false')


Change = tuple[int, str, float, bytes]
_CHANGES = st.lists(
    st.tuples(
        st.integers(0, 1 << 16),
        st.sampled_from(("value", "value", "value", "bytes", "insert", "cut", "truncate", "repeat", "swap")),
        st.floats(0.0, 1.0, exclude_max=True),
        st.one_of(st.sampled_from(_WEIRD).map(str.encode), st.binary(min_size=1, max_size=16)),
    ),
    min_size=1,
    max_size=4,
)


def changed(data: bytes, change: Change) -> bytes:
    """Return the bytes of a file with one change; those of a safetensors header keep its length right."""
    _, how, where, payload = change
    size = int.from_bytes(data[:8], "little")
    if how == "value" and 0 < size <= len(data) - 8 and data[8:9] == b"{":
        header = changed(data[8 : 8 + size], change)
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    found = list(_VALUE.finditer(data[: 1 << 18])) if how == "value" else []
    if found:
        spot = found[int(where * len(found))]
        return data[: spot.start()] + payload + data[spot.end() :]
    at = int(where * len(data))
    end = at + len(payload)
    return {
        "value": data[:at] + payload + data[end:],
        "bytes": data[:at] + payload + data[end:],
        "insert": data[:at] + payload + data[at:],
        "cut": data[:at] + data[end:],
        "truncate": data[:at],
        "repeat": data[:at] + data[at : at + 64] * len(payload) + data[at:],
        "swap": data[at:] + data[:at],
    }[how]


def fuzz(name: str, seconds: float, number: int) -> dict[str, Any]:
    """Read changed files for a while, and return how many directories were read, and what was found."""
    target, guard = TARGETS[name], Guard()
    findings: dict[str, str] = {}
    count, until = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        clean, broken = Path(folder) / "clean", Path(folder) / "broken"
        clean.mkdir()
        target.make(clean)
        target.read(clean)  # imports, and a proof that what is changed could be read
        names = sorted(path.relative_to(clean) for path in clean.glob(target.changed) if path.is_file())
        limit_memory()

        def attempt(changes: list[Change]) -> None:
            nonlocal count
            if time.monotonic() > until:
                return
            count += 1
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(clean, broken)
            for change in changes:
                path = broken / names[change[0] % len(names)]
                path.write_bytes(changed(path.read_bytes(), change))
            found = guard.what_goes_wrong(target, broken)
            if found is not None and found not in findings:
                findings[found] = keep(broken, f"{name}-{number}-{len(findings)}")

        while time.monotonic() < until:
            number += 1
            _search(attempt, number)
    return {"count": count, "findings": findings}


def _search(attempt: Callable[[list[Change]], None], number: int) -> None:
    quiet = settings(
        max_examples=200,
        deadline=None,
        database=None,
        phases=(Phase.generate,),
        suppress_health_check=list(HealthCheck),
    )
    seed(number)(quiet(given(_CHANGES)(attempt)))()


def run(options: argparse.Namespace) -> bool:
    """Fuzz every reader for `--seconds`, each in a process of its own; False if anything was found.

    Where atheris is installed, half of the time is steered by what the files reach.
    """
    clean, steered = True, guided.is_there()
    share = options.seconds / 2 if steered else options.seconds
    if not steered:
        say("atheris is not installed (pip install atheris): by chance alone, without looking at what is reached")
    for name in TARGETS:
        lines = [*_in_child(name, share, options.seed)]
        lines += guided.in_child(name, share, options.seed) if steered else []
        for line in lines:
            clean &= line.startswith("clean")
            say(f"{name}: {line}")
    return clean


def _in_child(name: str, seconds: float, number: int) -> Iterator[str]:
    code = f"import json; from benchmarks import fuzz; print(json.dumps(fuzz.fuzz({name!r}, {seconds}, {number})))"
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=seconds + _PATIENCE, check=False
        )
    except subprocess.TimeoutExpired:
        yield f"hangs: still alive {_PATIENCE:.0f} s after its time"
        return
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
        yield f"ended with exit code {done.returncode}: {last}"
        return
    told = json.loads(done.stdout.strip().splitlines()[-1])
    for what, where in told["findings"].items():
        yield f"{what} ({where})"
    if not told["findings"]:
        yield f"clean: {told['count']} broken directories in {seconds:.0f} s"
