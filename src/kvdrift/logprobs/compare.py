"""The comparison of two dumps of logprobs: read, pair, judge, and leave a run directory. Only composes."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from kvdrift.errors import UsageError
from kvdrift.logprobs.dump import Dump
from kvdrift.logprobs.files import read_dump
from kvdrift.logprobs.judge import judge
from kvdrift.logprobs.outcome import LogprobDecision, LogprobPlan
from kvdrift.logprobs.pairing import pair
from kvdrift.logprobs.view import build_view, screen, shown
from kvdrift.report.comparison import Comparison
from kvdrift.report.logprobs_page import render_logprobs_html
from kvdrift.report.markdown import MEANING_OF_LOGPROBS
from kvdrift.report.run_directory import RunDirectory


class LogprobComparison(Comparison[LogprobDecision]):
    """The result of two dumps."""

    __slots__ = ()

    @property
    def guilty(self) -> str | None:
        """The side that is off, `A`, `B` or `third`; None if that is not known."""
        return None if self.decision.guilt is None else self.decision.guilt.side

    def to_markdown(self) -> str:
        """Return the report for people."""
        return self.rendered("kvdrift.logprobs", "logprobs.md.jinja", MEANING_OF_LOGPROBS, shown=shown(self.view))

    def to_html(self) -> str:
        """Return the report as one page of HTML that fetches nothing."""
        return render_logprobs_html(self.view, shown(self.view))

    def screen(self) -> list[str]:
        """Return the lines that the command prints above the place of the report."""
        return screen(self.view)


def compare_logprobs(
    a: str, b: str, plan: LogprobPlan | None = None, *, out: Path | None = None, command: str | None = None
) -> LogprobComparison:
    """Compare two dumps, `FILE` or `FILE:COLUMN` each.

    Raises:
        UsageError: a file or an option is not usable, or A and B are one column of one file.
        TraceError: a file cannot be read.
        AlignmentError: the tokens of the dumps do not belong together.
    """
    plan = plan or LogprobPlan()
    names = {"A": a, "B": b, "third": plan.third, "repeat": plan.repeat, "repeat_b": plan.repeat_b}
    given = [name for name in names.values() if name is not None]
    if twice := next((name for name in given if given.count(name) > 1), None):
        raise UsageError(f"{twice} was given twice; name another file, or another of its columns (FILE:COLUMN)")
    with RunDirectory(out) as directory:
        dumps = {name: read_dump(source) for name, source in names.items() if source is not None}
        return compare_dumps(dumps, plan, directory, command=command)


def compare_dumps(
    dumps: Mapping[str, Dump], plan: LogprobPlan, directory: RunDirectory, *, command: str | None = None
) -> LogprobComparison:
    """Compare dumps that are in memory: `A` and `B`, and beside them `third`, `repeat` and `repeat_b`.

    Raises:
        AlignmentError: the tokens of the dumps do not belong together.
    """
    beside = {name: dumps.get(name) for name in ("third", "repeat", "repeat_b")}
    pairs = pair(dumps["A"], dumps["B"], third=beside["third"], repeat_a=beside["repeat"], repeat_b=beside["repeat_b"])
    decision = judge(pairs, plan)
    created = datetime.now(UTC).isoformat(timespec="seconds")
    view = build_view(decision, {"A": dumps["A"], "B": dumps["B"], **beside}, plan, created=created, command=command)
    result = LogprobComparison(decision, view, directory.target)
    result.leave(directory)
    return result
