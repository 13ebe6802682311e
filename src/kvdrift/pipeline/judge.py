"""Judges a directory: that of an audit which kept its traces, or one of trace files that another program wrote."""

from __future__ import annotations

from pathlib import Path

from kvdrift import __version__
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.recorded import is_audit, judge_recording, open_recording, run_of
from kvdrift.pipeline.saved import read_suite
from kvdrift.report.scenarios import build_suite_view
from kvdrift.report.view import build_view
from kvdrift.vocabulary.progress import Progress


def judge_directory(
    directory: Path,
    kind: str = "auto",
    *,
    alpha: float | None = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> tuple[Audit, str | None]:
    """Return the judged directory, and what was recognised in it; None for an audit's own.

    Args:
        directory: holds the traces.
        kind: "auto", or the format that the files are to be read as.
        alpha: chance of a false alarm; None for the one that the traces were recorded with, or the default.
        progress: hears of every pair of passes.
        command: what the report names to reproduce it.

    Raises:
        TraceError: the files are of no known format, are damaged, or contradict themselves.
        UsageError: the format or alpha is not usable.
    """
    if kind in ("auto", "kvdrift") and is_audit(directory):
        suite = read_suite(directory, alpha=alpha, progress=progress)
        judged = suite.judge()
        return Audit(judged.decision, build_suite_view(suite, judged), directory), None
    recording = open_recording(directory, kind)
    try:
        run = run_of(recording, alpha=alpha, progress=progress, command=command, versions={"kvdrift": __version__})
        decision = judge_recording(run, recording)
    finally:
        recording.close()
    return Audit(decision, build_view(run, decision), directory), recording.kind
