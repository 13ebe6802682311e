"""Judges GRETA StageTrace files, and writes the report and its table."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from kvdrift.errors import TraceError, UsageError
from kvdrift.pipeline.audit import Audit
from kvdrift.pipeline.judge import judge_recording, read_suite
from kvdrift.report.greta_table import COLUMNS, NONE, table
from kvdrift.report.run_directory import write_file
from kvdrift.trace.readers.greta.reader import open_greta
from kvdrift.vocabulary.plan import Mode
from kvdrift.vocabulary.progress import Progress
from kvdrift.vocabulary.scope import parse_scope

SCRIPT = "tools/benchmarks/analyze_b3_66_prefill_decode_drift.py"


def analyse_traces(
    traces_dir: Path,
    output: Path,
    mode: str,
    *,
    scope: Iterable[str] = (),
    command: str | None = None,
    progress: Progress | None = None,
) -> Audit:
    """Judge a directory of GRETA traces, and write the report and its table.

    Raises:
        UsageError: the mode or the scope is unknown, or the files cannot be written.
        TraceError: there are no traces, or they are damaged.
    """
    if mode not in ("both", *Mode):
        raise UsageError(f"unknown mode {mode!r}; use --mode as_designed, kv_aligned or both")
    if output.suffix != ".md":
        raise UsageError(f"the report is {output}, and must end in .md; the table is written beside it as .tsv")
    if not output.parent.is_dir():
        raise UsageError(f"cannot write {output}: there is no directory {output.parent}")
    if not traces_dir.is_dir():
        raise TraceError(f"there is no directory {traces_dir}")
    asked = parse_scope(scope)
    only = None if mode == "both" else Mode(mode)
    recording = open_greta(traces_dir, unmarked=only or Mode.AS_DESIGNED, only=only)
    try:
        suite = read_suite(recording, traces_dir, scope=asked, command=command, progress=progress)
        result = judge_recording(suite, recording)
    finally:
        recording.close()
    lines = ["\t".join(COLUMNS), *("\t".join(line) for line in table(result.suite.judged))]
    causes = sorted({line.split("\t")[7] for line in lines[1:]} - {NONE})
    ending = f"**Root cause**: {', '.join(causes) or 'none'}  \n**Script**: `{SCRIPT}`\n"
    write_file(output.with_suffix(".tsv"), "\n".join(lines) + "\n", "--output")
    write_file(output, result.to_markdown().rstrip("\n") + "  \n" + ending, "--output")
    return result
