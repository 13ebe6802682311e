"""Broken files for every reader: changed by hypothesis, read in a child process that may take little memory and time.

A reader may take a file or refuse it with a KvdriftError. Anything else is a finding: another exception, more memory
than the limit, more seconds than a file is worth, an end of the process, or a file opened outside the directory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from benchmarks.support import say
from kvdrift.errors import KvdriftError
from kvdrift.logprobs.files import read_dump
from kvdrift.pipeline.readers import open_recording

_ROOT = Path(__file__).resolve().parents[1]
_TRACES = _ROOT / "tests" / "golden" / "traces"
_KEPT = _ROOT / "build" / "fuzz"
_MORE_BYTES = 1 << 30  # beside what the process holds when it begins; the files have less than a megabyte
_MOST_SECONDS = 20  # of one directory
_PATIENCE = 90.0  # seconds behind its time that a child may take to end
_WEIRD = (
    "-1", "0", "1e308", "-0.5", "9223372036854775808", "1" * 400, "null", "true", "[]", "{}", '""', "NaN", "Infinity",
    '"../../../../etc/passwd"', '"/etc/passwd"', '"bfloat17"', '"\\u0000"', '"\\ud800"', "[[[[[[]]]]]]",
)  # fmt: skip
_VALUE = re.compile(rb'-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|"[^"\\]*"|null|true|false')


class Target(NamedTuple):
    """A reader: the recorded files that it starts from, which of them are changed, and how it reads."""

    archive: str
    changed: str
    read: Callable[[Path], object]


def _consume(directory: Path) -> None:
    recording = open_recording(directory)
    try:
        for item in recording.pairs():
            _ = [read.rows.sum() for trace in (item.pair.prefill, item.pair.decode) for read in trace.cache_reads()]
    finally:
        recording.close()


def _dumps(directory: Path) -> None:
    for path in sorted(directory.glob("*")):
        read_dump(path)


TARGETS = {
    "manifest": Target("own_clean", "**/*.json", _consume),
    "safetensors": Target("own_slot", "**/*.safetensors", _consume),
    "written": Target("written", "**/*.json*", _consume),
    "npz": Target("npz", "**/*.np[yz]", _consume),
    "npz-facts": Target("npz", "**/*.json*", _consume),
    "greta": Target("greta", "**/*.jsonl*", _consume),
    "debugger": Target("debugger", "**/*.json*", _consume),
    "pt": Target("sglang", "**/*.pt", _consume),
    "logprobs": Target("", "*.jsonl", _dumps),
    "logprobs-json": Target("", "*.json", _dumps),
}

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


class _TooLong(BaseException):
    """One directory took too many seconds."""


class _Guard:
    """Notes files that are opened outside of the directory that is read."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.outside: list[str] = []
        self._own = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, _ROOT / "src", _ROOT / "benchmarks")]
        self._own += [os.path.realpath(p) for p in sys.path if p] + ["/proc/", "/sys/", "/dev/"]
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or self.inside is None or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        scratch = os.path.realpath(tempfile.gettempdir()) + "/kvdrift"
        if not path.startswith((str(self.inside), scratch, *self._own)):
            self.outside.append(path)


def fuzz(name: str, seconds: float, number: int) -> dict[str, Any]:
    """Read changed files for a while, and return how many directories were read, and what was found."""
    target, guard = TARGETS[name], _Guard()
    findings: dict[str, str] = {}
    count, until = 0, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        clean, broken = Path(folder) / "clean", Path(folder) / "broken"
        _unpack(target, clean)
        target.read(clean)  # imports, and a proof that what is changed could be read
        names = sorted(path.relative_to(clean) for path in clean.glob(target.changed) if path.is_file())
        _limit_memory()
        signal.signal(signal.SIGALRM, _alarm)

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
            guard.inside, guard.outside = Path(os.path.realpath(broken)), []
            found = _what_goes_wrong(target, broken) or next((f"opened {path}" for path in guard.outside), None)
            guard.inside = None
            if found is not None and found not in findings:
                kept = _KEPT / f"{name}-{number}-{len(findings)}"
                shutil.rmtree(kept, ignore_errors=True)
                shutil.copytree(broken, kept)
                findings[found] = str(kept.relative_to(_ROOT))

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


def _what_goes_wrong(target: Target, directory: Path) -> str | None:
    """Read a directory, and say what is neither a result nor a message of kvdrift."""
    signal.alarm(_MOST_SECONDS)
    try:
        target.read(directory)
    except KvdriftError as error:
        return None if "\n" not in str(error).strip() else f"a message of several lines: {type(error).__name__}"
    except _TooLong:
        return f"more than {_MOST_SECONDS} s at {_place(sys.exc_info()[2])}"
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what is looked for
        return f"{type(error).__name__} at {_place(error.__traceback__)}: {str(error)[:120]!r}"
    finally:
        signal.alarm(0)
    return None


def _place(trace: Any) -> str:
    frames = [frame for frame in traceback.extract_tb(trace) if "/kvdrift/" in frame.filename]
    return f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "nowhere in kvdrift"


def _alarm(number: int, frame: object) -> None:
    raise _TooLong


def _limit_memory() -> None:
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MORE_BYTES, held + _MORE_BYTES))


def _unpack(target: Target, folder: Path) -> None:
    folder.mkdir()
    if target.archive:
        with tarfile.open(_TRACES / f"{target.archive}.tar.xz") as archive:
            archive.extractall(folder, filter="data")
        return
    rows = [
        {"id": f"s{n}", "prompt_ids": [1, 2], "token_ids": [3, 4, 5], "logprobs": [-0.5 - n, -1.25, -2.0]}
        for n in range(3)
    ]
    text = "\n".join(json.dumps(row) for row in rows) if target.changed.endswith("l") else json.dumps(rows)
    (folder / target.changed.replace("*", "dump")).write_text(text, encoding="utf-8")


def run(options: argparse.Namespace) -> bool:
    """Fuzz every reader for `--seconds`, each in a process of its own; False if anything was found."""
    clean = True
    for name in TARGETS:
        for line in _in_child(name, options.seconds, options.seed):
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
