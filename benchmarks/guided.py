"""Broken files for every reader, steered by what they reach: atheris keeps a file that takes a reader along a new path.

`benchmarks.broken` says what counts as a finding, and which files the readers start from. A run of libFuzzer ends its
process, so each reader has one of its own, and findings go into a file as they come.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import broken as readers

_PATIENCE = 120.0  # seconds behind its time that a child may take to begin and to end


def is_there() -> bool:
    """Whether atheris is installed."""
    return find_spec("atheris") is not None


def in_child(name: str, seconds: float, number: int) -> Iterator[str]:
    """Fuzz one reader in a process of its own, and yield what was found, or that nothing was."""
    with tempfile.TemporaryDirectory(prefix="guided-") as folder:
        told = Path(folder) / "told.json"
        code = f"from benchmarks import guided; guided.steer({name!r}, {seconds}, {number}, {str(told)!r})"
        try:
            done = subprocess.run(
                [sys.executable, "-c", code],
                capture_output=True,
                text=True,
                errors="replace",
                timeout=seconds + _PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            yield f"hangs: still alive {_PATIENCE:.0f} s after its time"
            return
        state: dict[str, Any] = {"count": 0, "findings": {}}
        if told.exists():
            state = json.loads(told.read_text(encoding="utf-8"))
        for what, where in state["findings"].items():
            yield f"{what} ({where})"
        if done.returncode or not state["count"]:
            last = (done.stderr.strip().splitlines() or ["nothing was said"])[-1]
            yield f"ended with exit code {done.returncode} after {state['count']} files: {last}"
        elif not state["findings"]:
            yield f"clean, steered: {state['count']} broken directories in {seconds:.0f} s"


def steer(name: str, seconds: float, number: int, told: str) -> None:
    """Let libFuzzer change one file of a target at a time until its seconds are over; the process ends with it."""
    atheris: Any = import_module("atheris")
    with atheris.instrument_imports(include=["kvdrift"]):
        target, guard = readers.TARGETS[name], readers.Guard()
    folder = Path(tempfile.mkdtemp(prefix="guided-", dir=Path(told).parent))
    clean, broken, corpus = folder / "clean", folder / "broken", folder / "corpus"
    clean.mkdir()
    corpus.mkdir()
    target.make(clean)
    target.read(clean)
    names = sorted(path.relative_to(clean) for path in clean.glob(target.changed) if path.is_file())
    for index, path in enumerate(names):
        (corpus / str(index)).write_bytes(bytes([index % 256]) + (clean / path).read_bytes())
    readers.limit_memory()
    state: dict[str, object] = {"count": 0, "findings": {}}
    findings: dict[str, str] = {}

    def attempt(data: bytes) -> None:
        count = int(str(state["count"])) + 1
        state["count"] = count
        shutil.rmtree(broken, ignore_errors=True)
        shutil.copytree(clean, broken)
        (broken / names[(data[0] if data else 0) % len(names)]).write_bytes(data[1:])
        found = guard.what_goes_wrong(target, broken)
        if found is not None and found not in findings:
            findings[found] = readers.keep(broken, f"{name}-steered-{number}-{len(findings)}")
            state["findings"] = findings
        if found is not None or count % 50 == 0 or count < 50:
            Path(told).write_text(json.dumps(state), encoding="utf-8")

    largest = max((clean / path).stat().st_size for path in names)
    arguments = [sys.argv[0], f"-max_total_time={max(1, int(seconds))}", f"-seed={number + 1}", "-rss_limit_mb=0"]
    atheris.Setup([*arguments, f"-max_len={2 * largest + 64}", "-print_final_stats=0", str(corpus)], attempt)
    os.chdir(folder)  # what libFuzzer itself puts down
    atheris.Fuzz()
