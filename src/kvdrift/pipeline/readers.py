"""The formats of traces that can be read: one table, in the order in which a directory is tried."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kvdrift.errors import TraceError, UsageError
from kvdrift.trace.readers.debugger import is_debugger, open_debugger
from kvdrift.trace.readers.greta.reader import open_greta
from kvdrift.trace.readers.npz import is_npz, open_npz
from kvdrift.trace.readers.own import is_own, open_own
from kvdrift.trace.readers.sglang import open_sglang
from kvdrift.trace.readers.written import is_written, open_written
from kvdrift.trace.recording import Recording, files_under


class TraceFormat(NamedTuple):
    """A format of traces: its name on the command line, how it is recognised, and its reader."""

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[[Path], Recording]


def _open_sglang(directory: Path) -> Recording:
    from kvdrift.engines.torch_files import read_tensor_file

    return open_sglang(directory, read_tensor_file)


FORMATS = (
    TraceFormat("kvdrift", is_own, open_own),
    TraceFormat("kvdrift", is_written, open_written),
    TraceFormat("transformers-debug", is_debugger, open_debugger),
    TraceFormat("npz", is_npz, open_npz),
    TraceFormat("sglang", lambda directory: bool(files_under(directory, ".pt")), _open_sglang),
    TraceFormat("greta", lambda directory: bool(files_under(directory, ".jsonl", ".jsonl.gz")), open_greta),
)
NAMES = ("auto", *dict.fromkeys(item.name for item in FORMATS))


def open_recording(directory: Path, kind: str = "auto") -> Recording:
    """Open a directory of traces.

    Raises:
        UsageError: the format is unknown.
        TraceError: the files are of no known format, or cannot be read.
    """
    if kind not in NAMES:
        raise UsageError(f"unknown format {kind!r}; use --format {', '.join(NAMES)} (kind=...)")
    known = [item for item in FORMATS if kind in ("auto", item.name)]
    found = next((item for item in known if item.recognises(directory)), None)
    if found is None and kind != "auto":
        found = known[-1]  # its reader says what is missing
    if found is None:
        raise TraceError(
            f"{directory} holds no traces to judge; it is not a run directory, was made with --no-traces, or holds "
            f"files of no known format (--format knows {', '.join(NAMES[1:])})"
        )
    return found.open(directory)
