"""Reads a directory of traces and says what is there, before anything is judged."""

from __future__ import annotations

from pathlib import Path

from kvdrift.pipeline.judge import read_suite
from kvdrift.pipeline.readers import open_recording
from kvdrift.verdict.inventory import Inventory, take_inventory
from kvdrift.vocabulary.progress import Progress


def check_traces(directory: Path, kind: str = "auto", *, progress: Progress | None = None) -> Inventory:
    """Return what a directory of traces holds, lacks, and what that costs.

    Raises:
        TraceError: the files are of no known format, are damaged, or contradict themselves.
        UsageError: the format is not known.
    """
    recording = open_recording(directory, kind)
    try:
        return take_inventory(read_suite(recording, directory, progress=progress).base, recording)
    finally:
        recording.close()
