"""A against B: dumps of logprobs, engines, directories of traces, servers. Only composes."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

from kvdrift.errors import EngineUnavailable, TraceError, UsageError
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
_OF_SPEAKERS = ("dtype_a", "dtype_b", "drop", "alpha", "seed")
_SERVER = "a server"


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
            `kvdrift audit` takes it, a model of transformers, an engine of your own, an open engine; or the address of
            a server.
        b: another one of the same kind, of the same tokens; beside a server an engine too, at its native precision.
        out: the run directory; nothing is written without it.
        command: how the comparison is run again, for the report.
        progress: hears what is being done.
        options: of dumps: third, repeat, repeat_b, dtype_a, dtype_b, drop, alpha, seed. Of engines: prompts, span. With
            a server: prompts, span, dtype_a, dtype_b, drop, alpha, seed, model_a, model_b, max_requests, timeout.

    Raises:
        UsageError: something cannot be compared, or an option is not known or for something else.
        TraceError: a file cannot be read.
        AlignmentError: tokens, layers or widths do not belong together.
        EngineUnavailable, CaptureError: an engine cannot be had, or broke off.
    """
    place = None if out is None else Path(out)
    kinds = [_kind(target) for target in (a, b)]
    given = {name: value for name, value in options.items() if value is not None}
    if _SERVER in kinds and {*kinds} <= {_SERVER, "an engine"}:
        return _compare_served(a, b, given, place, command, progress)
    if kinds[0] != kinds[1]:
        raise UsageError(f"A is {kinds[0]} and B is {kinds[1]}; compare two of one kind, or a server with an engine")
    if kinds[0] == "a dump of logprobs":
        _refuse(given, LogprobPlan.__slots__, kinds[0])
        plan: dict[str, Any] = {name: str(value) if name in _FILES else value for name, value in given.items()}
        return compare_logprobs(str(a), str(b), LogprobPlan(**plan), out=place, command=command)
    if kinds[0] == "a directory of traces":
        _refuse(given, (), kinds[0])
        return _compare_traces(Path(a), Path(b), place, command)
    _refuse(given, _OF_ENGINES, kinds[0])
    return compare_engines(a, b, out=place, command=command, progress=progress, **given)


def _compare_served(
    a: Any, b: Any, given: dict[str, Any], out: Path | None, command: str | None, progress: Progress | None
) -> LogprobComparison:
    try:
        import httpx  # noqa: F401
    except ModuleNotFoundError as error:
        raise EngineUnavailable("asking a server needs 'httpx'; pip install 'kvdrift[server]'") from error
    from kvdrift.pipeline.compare_speakers import SpeakerPlan, compare_speakers

    asked = [item.name for item in fields(SpeakerPlan)]
    _refuse(given, ("prompts", *asked, *_OF_SPEAKERS), _SERVER)
    return compare_speakers(
        a,
        b,
        SpeakerPlan(**{name: given[name] for name in asked if name in given}),
        LogprobPlan(**{name: given[name] for name in _OF_SPEAKERS if name in given}),
        prompts=given.get("prompts"),
        out=out,
        command=command,
        progress=progress,
    )


def _kind(target: Any) -> str:
    if isinstance(target, str) and target.startswith(("http://", "https://")):
        return _SERVER
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
