"""The result of a comparison of two sides: its verdict, its view, and the run directory that it leaves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from kvdrift.errors import VerdictError
from kvdrift.report.markdown import STATUS, environment_of
from kvdrift.report.run_directory import RunDirectory
from kvdrift.report.view import to_strict_json
from kvdrift.vocabulary.evidence import Verdict


class Concluded(Protocol):
    """A decision, as far as every comparison has one."""

    @property
    def verdict(self) -> Verdict: ...

    @property
    def conclusion(self) -> str: ...


D = TypeVar("D", bound=Concluded)


@dataclass(frozen=True, slots=True, repr=False)
class Comparison(Generic[D]):
    """What two sides, A and B, came to. `path` is the run directory, None if none was written."""

    decision: D
    view: dict[str, Any]
    path: Path | None

    @property
    def verdict(self) -> Verdict:
        return self.decision.verdict

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
        raise NotImplementedError

    def to_html(self) -> str:
        """Return the report as one page of HTML that fetches nothing."""
        raise NotImplementedError

    def screen(self) -> list[str]:
        """Return the lines that the command prints above the place of the report."""
        raise NotImplementedError

    def pages(self) -> dict[str, Callable[[], str]]:
        """Return what makes each file of the run directory, by its name; people are shown the last one."""
        return {"report.json": self.to_json, "report.md": self.to_markdown, "report.html": self.to_html}

    def summary(self) -> str:
        """Return what the command prints."""
        lines = self.screen()
        if self.path is not None:
            lines.append(f"report: {self.path / [*self.pages()][-1]}")
        return "\n".join(lines) + "\n"

    def rendered(self, package: str, template: str, meaning: Mapping[str, str], **names: Any) -> str:
        """Return a template of a package with the view, and with what its verdict means."""
        verdict = self.view["verdict"]
        return (
            environment_of(package)
            .get_template(template)
            .render(view=self.view, meaning=meaning[verdict], status=STATUS[verdict], **names)
        )

    def leave(self, directory: RunDirectory) -> None:
        """Write the reports into a run directory, if one was asked for."""
        if directory.work is not None:
            for name, render in self.pages().items():
                (directory.work / name).write_text(render(), encoding="utf-8")
            directory.commit()

    def __repr__(self) -> str:
        return f"<{type(self).__name__} {self.verdict}: {self.decision.conclusion}>"


__all__ = ["Comparison", "Concluded"]
