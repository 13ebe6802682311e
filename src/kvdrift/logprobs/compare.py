"""The comparison of two dumps of logprobs: read, pair, judge, and leave a run directory. Only composes."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from kvdrift.errors import UsageError, VerdictError
from kvdrift.logprobs.files import read_dump
from kvdrift.logprobs.judge import judge
from kvdrift.logprobs.outcome import LogprobDecision, LogprobPlan
from kvdrift.logprobs.pairing import pair
from kvdrift.logprobs.view import build_view, screen, shown
from kvdrift.report.markdown import MEANING_OF_LOGPROBS, STATUS, environment_of
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.view import to_strict_json
from kvdrift.vocabulary.evidence import Verdict


@dataclass(frozen=True, slots=True)
class LogprobComparison:
    """The result. `path` is the run directory, None if none was written."""

    decision: LogprobDecision
    view: dict[str, Any]
    path: Path | None

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

    @property
    def guilty(self) -> str | None:
        """The side that is off, `A`, `B` or `third`; None if that is not known."""
        return None if self.decision.guilt is None else self.decision.guilt.side

    @property
    def exit_code(self) -> int:
        """0 STRUCTURAL_DRIFT, 1 MISMATCH, 6 INCONCLUSIVE."""
        return self.verdict.exit_code

    def check(self) -> None:
        """Do nothing for a pass.

        Raises:
            VerdictError: the verdict is another.
        """
        if self.exit_code:
            raise VerdictError(self.summary(), self.exit_code)

    def to_json(self) -> str:
        """Return the report as strict JSON; non-finite figures are the strings "nan", "inf" and "-inf"."""
        return to_strict_json(self.view)

    def to_markdown(self) -> str:
        """Return the report for people."""
        template = environment_of("kvdrift.logprobs").get_template("logprobs.md.jinja")
        verdict = self.view["verdict"]
        return template.render(
            view=self.view, shown=shown(self.view), meaning=MEANING_OF_LOGPROBS[verdict], status=STATUS[verdict]
        )

    def summary(self) -> str:
        """Return the screen that the command prints."""
        lines = screen(self.view)
        if self.path is not None:
            lines.append(f"report: {self.path / 'report.md'}")
        return "\n".join(lines) + "\n"

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.verdict}: {self.decision.conclusion}>"


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
        dumps = {name: None if source is None else read_dump(source) for name, source in names.items()}
        one, two = dumps["A"], dumps["B"]
        assert one is not None
        assert two is not None
        pairs = pair(one, two, third=dumps["third"], repeat_a=dumps["repeat"], repeat_b=dumps["repeat_b"])
        decision = judge(pairs, plan)
        created = datetime.now(UTC).isoformat(timespec="seconds")
        view = build_view(decision, dumps, plan, created=created, command=command)
        result = LogprobComparison(decision, view, directory.target)
        if directory.work is not None:
            (directory.work / "report.json").write_text(result.to_json(), encoding="utf-8")
            (directory.work / "report.md").write_text(result.to_markdown(), encoding="utf-8")
            directory.commit()
    return result
