"""Audits, judgements and sweeps that are killed by chance: what is left is whole, and what was finished stays.

Each round starts a command that replaces an earlier run, and kills it after a random part of the time that it takes.
What stands in its place must then be whole, the earlier run or the new one, and the next run must leave nothing of the
killed one behind. A killed sweep is gone on with: it must not do a finished cell again, and must end complete.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks.support import say
from kvdrift.report.run_directory import RunDirectory
from kvdrift.sweep.store import DECLARED, SUMMARY, SweepDirectory
from kvdrift_bench.models.tiny import tiny_model

_ENGINES = Path(__file__).resolve().parents[1] / "examples" / "engines"
# An engine of numpy: of a process that imports torch, nine kills in ten would meet the import and not the run.
_AUDIT = f"""
import sys, kvdrift
sys.path.insert(0, {str(_ENGINES)!r})
from numpy_engine import make
kvdrift.audit(make(), prompts={{"p": [1, 2, 3, 4, 5]}}, span=2, out=sys.argv[1])
"""
_MAIN = "import sys; sys.argv[0] = 'kvdrift'; from kvdrift.cli.app import main; main()"


class Command(NamedTuple):
    """A command that makes or judges the run directory `place`, and whether it writes there."""

    name: str
    arguments: tuple[str, ...]
    writes: bool


def commands(place: Path) -> tuple[Command, ...]:
    """Return what is killed: an audit into a place, and a judgement of it whose report goes into a file beside it."""
    return (
        Command("audit", ("-c", _AUDIT, str(place)), writes=True),
        Command("judge", ("-c", _MAIN, "judge", str(place), "--html", str(place.parent / "page.html")), writes=False),
    )


def whole(place: Path) -> str | None:
    """Return what is wrong with the run directory at `place`, None if it is whole."""
    names = {"report.json", "report.md", "report.html", "traces"}
    missing = names - {path.name for path in place.iterdir()}
    if missing:
        return f"{place} lacks {', '.join(sorted(missing))}"
    try:
        report = json.loads((place / "report.json").read_text(encoding="utf-8"))
        manifest = json.loads((place / "traces" / "manifest.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return f"{place} is not whole: {error}"
    page = (place / "report.html").read_text(encoding="utf-8")
    if not page.rstrip().endswith("</html>") or "verdict" not in report or not manifest:
        return f"{place} has a report that is cut off"
    return None


def kill_at(arguments: Sequence[str], seconds: float) -> bool:
    """Start Python with `arguments`, kill it after `seconds`, and return whether it was still running."""
    process = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return True
    return False


def attack(folder: Path, moments: int, seed: int) -> tuple[int, list[str]]:
    """Kill each command at `moments` moments, and return how often one was still running, and what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    place, pick = folder / "run", random.Random(seed)
    page = folder / "page.html"
    n_killed, found = 0, []
    for command in commands(place):
        began = time.perf_counter()
        subprocess.run([sys.executable, *command.arguments], check=False, stdout=subprocess.DEVNULL)
        lasts = time.perf_counter() - began
        for _ in range(moments):
            after = pick.uniform(0.2, 1.05) * lasts
            n_killed += kill_at(command.arguments, after)
            wrong = whole(place)
            if wrong is None and page.exists() and not page.read_text(encoding="utf-8").rstrip().endswith("</html>"):
                wrong = f"{page} is cut off"
            if wrong is not None:
                found.append(f"{command.name}, killed after {after:.2f} s: {wrong}")
        with RunDirectory(place) as directory:  # the next run clears what the dead ones left
            left = [path.name for path in folder.glob(".run.*.part") if path != (directory.work or path).parent]
        found += [f"{command.name}: {name} was left behind" for name in left]
    return n_killed, found


_SPEC = """
[matrix]
models = ["./tiny"]
dtypes = ["bfloat16", "float32"]
seeds = [0, 1]
[prompts]
p = [5, 9, 17]
[audit]
span = 1
traces = true
"""


def attack_sweep(folder: Path, moments: int, seed: int) -> tuple[int, list[str]]:
    """Kill a sweep's driver at `moments` moments and go on with it; how often one was still running, what was found."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny_model("llama", torch.bfloat16, "sdpa").save_pretrained(folder / "tiny")
    spec = folder / "sweep.toml"
    spec.write_text(_SPEC, encoding="utf-8")
    pick = random.Random(seed)
    n_killed, found = 0, []
    began = time.perf_counter()
    _sweep(spec, folder / "whole")
    lasts = time.perf_counter() - began
    for moment in range(moments):
        place, after = folder / f"sweep{moment}", pick.uniform(0.2, 1.0) * lasts
        n_killed += kill_at(("-c", _MAIN, "sweep", str(spec), "--out", str(place), "--jobs", "1"), after)
        found += [f"sweep, killed after {after:.2f} s: {wrong}" for wrong in _after_the_kill(spec, place)]
        shutil.rmtree(place, ignore_errors=True)
    return n_killed, found


def _sweep(spec: Path, place: Path) -> subprocess.CompletedProcess[str]:
    """Run a sweep to its end, or go on with one that was declared before it was killed."""
    which = ("--resume", str(place)) if (place / DECLARED).exists() else (str(spec), "--out", str(place))
    command = [sys.executable, "-c", _MAIN, "sweep", *which, "--jobs", "1"]
    return subprocess.run(command, check=False, capture_output=True, text=True)


def _after_the_kill(spec: Path, place: Path) -> Iterator[str]:
    """Yield what is wrong with what a killed sweep left, and with how it goes on."""
    until = time.monotonic() + 60
    while place.exists() and SweepDirectory(place).is_driven() and time.monotonic() < until:
        time.sleep(0.05)  # workers of a dead driver finish what they hold
    finished = {path: path.stat().st_mtime_ns for path in place.glob("results/*.json")}
    for path in finished:
        cell = place / "cells" / path.stem
        wrong = whole(cell) if cell.is_dir() else f"{cell} is missing, and its result is there"
        if wrong is not None:
            yield wrong
    if (place / SUMMARY).exists() and len(json.loads((place / SUMMARY).read_text(encoding="utf-8"))["cells"]) != 4:
        yield f"{place / SUMMARY} lacks cells"
    done = _sweep(spec, place)
    if done.returncode:
        yield f"does not go on: {done.stderr.strip()[-300:]}"
        return
    again = [path.stem for path, at in finished.items() if path.stat().st_mtime_ns != at]
    if again:
        yield f"did finished cells again: {', '.join(again)}"
    if len(list(place.glob("results/*.json"))) != 4:
        yield "ended without all of its cells"
    left = [str(path.relative_to(place)) for path in place.rglob("*.part")]
    if left:
        yield f"left behind {', '.join(left)}"


def run(options: argparse.Namespace) -> bool:
    """Kill each command `--moments` times; False if anything that is not whole was left."""
    with tempfile.TemporaryDirectory() as folder:
        n_killed, found = attack(Path(folder) / "runs", options.moments, options.seed)
        n_sweeps, more = attack_sweep(Path(folder) / "sweeps", options.moments, options.seed)
    found += more
    for line in found:
        say(line)
    say(f"{n_killed} of {2 * options.moments} audits and judgements and {n_sweeps} of {options.moments} sweeps were")
    say(f"killed while they ran; {len(found)} findings")
    return not found and n_killed > 0 and n_sweeps > 0
