"""Audits and judgements that are killed at moments by chance: what is left is a whole run or none.

Each round starts a command that replaces an earlier run, and kills it after a random part of the time that it takes.
What stands in its place must then be whole, the earlier run or the new one, and the next run must leave nothing of the
killed one behind.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.support import say
from kvdrift.report.run_directory import RunDirectory

_AUDIT = """
import sys, torch, kvdrift
from kvdrift_bench.models.tiny import tiny_model
torch.set_num_threads(1)
kvdrift.audit(tiny_model("llama", torch.bfloat16, "sdpa"), prompts={"p": [1, 2, 3, 4, 5]}, span=2, out=sys.argv[1])
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


def run(options: argparse.Namespace) -> bool:
    """Kill each command `--moments` times; False if anything that is not whole was left."""
    with tempfile.TemporaryDirectory() as folder:
        n_killed, found = attack(Path(folder), options.moments, options.seed)
    for line in found:
        say(line)
    say(f"{n_killed} of {2 * options.moments} processes were killed while they ran; {len(found)} findings")
    return not found and n_killed > 0
