"""A against B: two dumps of logprobs, two engines, or two directories of traces. Only composes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from kvdrift.errors import TraceError, UsageError
from kvdrift.logprobs.compare import LogprobComparison, compare_logprobs
from kvdrift.logprobs.files import is_dump
from kvdrift.logprobs.outcome import LogprobPlan
from kvdrift.pipeline.readers import open_recording
from kvdrift.report.run_directory import RunDirectory
from kvdrift.trace.recording import Recording
from kvdrift.versus.compare import EngineComparison, compare_engines, finish
from kvdrift.versus.recorded import side_of_recording
from kvdrift.vocabulary.progress import Progress

_OF_ENGINES = ("prompts", "span")
_FILES = {"third", "repeat", "repeat_b"}


def compare(
    a: Any,
    b: Any,
    *,
    out: str | Path | None = None,
    command: str | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> LogprobComparison | EngineComparison:
    """Compare A with B: is what they differ by rounding, where does it begin, and which of them is off?

    Args:
        a: a dump of logprobs (`FILE` or `FILE:COLUMN`), a directory of traces, or an engine: the name of a model as
            `kvdrift audit` takes it, a model of transformers, an engine of your own, an open engine.
        b: another one of the same kind, of the same tokens.
        out: the run directory; nothing is written without it.
        command: how the comparison is run again, for the report.
        progress: hears what is being done.
        options: of dumps: third, repeat, repeat_b, dtype_a, dtype_b, drop, alpha, seed. Of engines: prompts, span.

    Raises:
        UsageError: something cannot be compared, or an option is not known or for something else.
        TraceError: a file cannot be read.
        AlignmentError: tokens, layers or widths do not belong together.
        EngineUnavailable, CaptureError: an engine cannot be had, or broke off.
    """
    place = None if out is None else Path(out)
    kinds = [_kind(target) for target in (a, b)]
    if kinds[0] != kinds[1]:
        raise UsageError(f"A is {kinds[0]} and B is {kinds[1]}; compare two of one kind")
    given = {name: value for name, value in options.items() if value is not None}
    if kinds[0] == "a dump of logprobs":
        _refuse(given, LogprobPlan.__slots__, kinds[0])
        plan: dict[str, Any] = {name: str(value) if name in _FILES else value for name, value in given.items()}
        return compare_logprobs(str(a), str(b), LogprobPlan(**plan), out=place, command=command)
    if kinds[0] == "a directory of traces":
        _refuse(given, (), kinds[0])
        return _compare_traces(Path(a), Path(b), place, command)
    _refuse(given, _OF_ENGINES, kinds[0])
    return compare_engines(a, b, out=place, command=command, progress=progress, **given)


def _kind(target: Any) -> str:
    if is_dump(target):
        return "a dump of logprobs"
    if isinstance(target, str | Path) and Path(target).is_dir() and not (Path(target) / "config.json").exists():
        return "a directory of traces"
    return "an engine"


def _refuse(given: dict[str, Any], known: tuple[str, ...], kind: str) -> None:
    if unknown := sorted(set(given) - set(known)):
        raise UsageError(
            f"{unknown[0]} is not for {kind}, which takes {', '.join(known) or 'no options'}; leave it out"
        )


def _compare_traces(a: Path, b: Path, out: Path | None, command: str | None) -> EngineComparison:
    if a.resolve() == b.resolve():
        raise UsageError(f"{a} was given twice; name another directory")
    opened: list[Recording] = []
    with RunDirectory(out) as directory:
        try:
            for path in (a, b):
                opened.append(open_recording(path))
            first = side_of_recording("A", opened[0], str(a))
            try:
                second = side_of_recording("B", opened[1], str(b), first.rung)
            except TraceError:
                # The coarser of the two decides, where A is the finer one.
                second = side_of_recording("B", opened[1], str(b))
                first = side_of_recording("A", opened[0], str(a), second.rung)
        finally:
            for recording in opened:
                recording.close()
        if not first.prompts.keys() & second.prompts.keys():
            raise TraceError(
                f"{a} and {b} have no prompt in common ({', '.join(first.prompts)} and {', '.join(second.prompts)}); "
                "record both on the same tokens, under the same names"
            )
        return finish(first, second, directory, command)
