"""The readers of files from elsewhere, each with files to begin from, and what counts as a finding when one is broken.

A reader may take a file or refuse it with a KvdriftError. Anything else is a finding: another exception, more memory
than the limit, more seconds than a file is worth, an end of the process, or a file opened outside the directory.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import sys
import tarfile
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import save_file

from kvdrift.errors import KvdriftError
from kvdrift.logprobs.files import read_dump
from kvdrift.pipeline.readers import open_recording
from kvdrift.sweep.cells import expand
from kvdrift.sweep.spec import read_spec

_ROOT = Path(__file__).resolve().parents[1]
_TRACES = _ROOT / "tests" / "golden" / "traces"
_KEPT = _ROOT / "build" / "fuzz"
_MORE_BYTES = 1 << 30  # beside what the process holds when it begins; the files have less than a megabyte
_MOST_SECONDS = 20  # of one directory


class Target(NamedTuple):
    """A reader: how the files that it starts from come into a folder, which of them are changed, and how it reads."""

    make: Callable[[Path], None]
    changed: str
    read: Callable[[Path], object]


def _archive(name: str) -> Callable[[Path], None]:
    """Recorded traces of the repository."""

    def unpack(folder: Path) -> None:
        with tarfile.open(_TRACES / f"{name}.tar.xz") as archive:
            archive.extractall(folder, filter="data")

    return unpack


_SEQUENCES = [
    {"id": f"s{n}", "prompt_ids": [1, 2], "token_ids": [3, 4, 5], "logprobs": [-0.5 - n, -1.25, -2.0]} for n in range(3)
]
_COLUMNS = {
    "token_ids": np.array([[3, 4, 5]] * 3),
    "logprobs": np.array([row["logprobs"] for row in _SEQUENCES], dtype=np.float32),
    "mask": np.array([[1, 1, 0]] * 3, dtype=np.uint8),
    "id": np.array([0, 1, 2]),
}
_SPEC = """
name = "night"
alpha = 0.001
[[matrix.models]]
name = "q"
hf = "./q"
llamacpp = "./q.gguf"
memory = "4 GB"
cpus = 2
[matrix]
engines = ["hf", "llamacpp"]
dtypes = ["bfloat16", "float32"]
scenarios = ["decode", "rewind"]
lengths = [64, "8-64"]
seeds = [0, 1]
pairs = [["hf", "llamacpp"]]
[prompts]
short = "Hi"
ids = [5, 9, 17]
[audit]
span = 4
mode = "both"
"""


def _text(name: str, text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / name).write_text(text, encoding="utf-8")

    return write


def _dump_npz(folder: Path) -> None:
    np.savez(folder / "dump.npz", allow_pickle=False, **_COLUMNS)


def _dump_safetensors(folder: Path) -> None:
    save_file(_COLUMNS, folder / "dump.safetensors")


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


def _specs(directory: Path) -> None:
    for path in sorted(directory.glob("*.toml")):
        expand(read_spec(path))


TARGETS = {
    "manifest": Target(_archive("own_clean"), "**/*.json", _consume),
    "safetensors": Target(_archive("own_slot"), "**/*.safetensors", _consume),
    "written": Target(_archive("written"), "**/*.json*", _consume),
    "npz": Target(_archive("npz"), "**/*.np[yz]", _consume),
    "npz-facts": Target(_archive("npz"), "**/*.json*", _consume),
    "greta": Target(_archive("greta"), "**/*.jsonl*", _consume),
    "debugger": Target(_archive("debugger"), "**/*.json*", _consume),
    "pt": Target(_archive("sglang"), "**/*.pt", _consume),
    "logprobs": Target(_text("dump.jsonl", "\n".join(map(json.dumps, _SEQUENCES))), "*", _dumps),
    "logprobs-json": Target(_text("dump.json", json.dumps(_SEQUENCES)), "*", _dumps),
    "logprobs-npz": Target(_dump_npz, "*", _dumps),
    "logprobs-safetensors": Target(_dump_safetensors, "*", _dumps),
    "sweep": Target(_text("sweep.toml", _SPEC), "*", _specs),
}


class _TooLong(BaseException):
    """One directory took too many seconds."""


class Guard:
    """Notes files that are opened outside of the directory that is read."""

    def __init__(self) -> None:
        self.inside: Path | None = None
        self.outside: list[str] = []
        self._own = [os.path.realpath(p) for p in (sys.prefix, sys.base_prefix, _ROOT / "src", _ROOT / "benchmarks")]
        self._own += [os.path.realpath(p) for p in sys.path if p] + ["/proc/", "/sys/", "/dev/"]
        # Asked for once: the first time opens a file, and the hook would wait for itself.
        self._own.append(os.path.realpath(tempfile.gettempdir()) + "/kvdrift")
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if event != "open" or self.inside is None or not isinstance(args[0], str | bytes):
            return
        path = os.path.realpath(os.fsdecode(args[0]))
        if not path.startswith((str(self.inside), *self._own)):
            self.outside.append(path)

    def what_goes_wrong(self, target: Target, directory: Path) -> str | None:
        """Read a directory, and say what is neither a result nor a message of kvdrift."""
        self.inside, self.outside = Path(os.path.realpath(directory)), []
        found = _what_goes_wrong(target, directory) or next((f"opened {path}" for path in self.outside), None)
        self.inside = None
        return found


def keep(directory: Path, name: str) -> str:
    """Copy a directory that breaks a reader to where it can be looked at, and return that place."""
    kept = _KEPT / name
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(directory, kept)
    return str(kept.relative_to(_ROOT))


def _what_goes_wrong(target: Target, directory: Path) -> str | None:
    """Read a directory, and say what is neither a result nor a message of kvdrift."""
    signal.signal(signal.SIGALRM, _alarm)
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


def limit_memory() -> None:
    """Allow this process _MORE_BYTES above what it holds."""
    held = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + _MORE_BYTES, held + _MORE_BYTES))
