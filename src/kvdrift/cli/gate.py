"""`kvdrift gate`: a verdict for continuous integration, with no tolerance to set."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kvdrift.cli import options
from kvdrift.cli.errors import errors_as_messages
from kvdrift.cli.output import EXIT_CODES, print_lines, print_result
from kvdrift.engines.open import find_engine
from kvdrift.errors import UsageError
from kvdrift.vocabulary.plan import AuditPlan

if TYPE_CHECKING:
    from kvdrift.pipeline.audit import Audit

app = typer.Typer()


@app.command(
    epilog="Examples:\n\n"
    "    kvdrift gate ./my-model --junit kvdrift.xml\n\n"
    "    kvdrift gate kvdrift-runs/20260207-101500 --baseline runs/main --github-summary\n\n"
    f"    kvdrift gate mypackage.models:load --scenario all --out runs/branch\n\n{EXIT_CODES} Nothing but 0 is green; "
    "1 is also a run that is worse than its baseline."
)
def gate(
    target: Annotated[str, typer.Argument(metavar="MODEL|DIR", help="A model to audit, or a run to look at.")],
    baseline: Annotated[Path | None, typer.Option(help="An earlier run: what is worse than it is red too.")] = None,
    junit: Annotated[Path | None, typer.Option(help="Write JUnit XML to this file.")] = None,
    github_summary: Annotated[
        bool, typer.Option("--github-summary", help="Write the job summary and annotations of GitHub Actions.")
    ] = False,
    scenario: options.Scenario = "decode",
    prompts: options.Prompts = None,
    out: options.Out = None,
    as_json: options.AsJson = False,
) -> None:
    """Audit a model, or read a run, and be red unless it passes. What bounds drift is the noise that was measured."""
    with errors_as_messages():
        from kvdrift.pipeline.diff import diff_runs
        from kvdrift.report.ci import github_annotation
        from kvdrift.report.ci import junit as to_junit
        from kvdrift.report.lines import ten_lines
        from kvdrift.report.run_directory import write_file
        from kvdrift.report.view import to_strict_json
        from kvdrift.vocabulary.evidence import Verdict

        if baseline is not None:
            options.existing_run(baseline)
        view, path = _view_of(target, scenario, prompts, out)
        compared = None if baseline is None else diff_runs(baseline, path)
        worse = () if compared is None else compared.worse
        if junit is not None:
            write_file(junit, to_junit(view, worse), "--junit")
        if github_summary:
            _write_summary(view, worse)
        if as_json:
            print_result(to_strict_json(view))
        else:
            lines = ten_lines(view, path) + [f"worse than {baseline}: {line}" for line in worse]
            if compared is not None and compared.why_not is not None:
                lines.append(f"baseline {baseline}: drift was not compared place by place: {compared.why_not}")
            print_lines(lines)
            if github_summary and (line := github_annotation(view, worse)) is not None:
                print_result(line)
        code = Verdict(view["verdict"]).exit_code or (1 if worse else 0)
    raise typer.Exit(code)


def _view_of(target: str, scenario: str, prompts: Path | None, out: Path | None) -> tuple[dict[str, Any], Path]:
    """Return the report of a run directory, or of the audit of a model, and where it lies."""
    from kvdrift.pipeline.diff import read_view

    folder = Path(target)
    if (folder / "report.json").is_file():
        if out is not None or prompts is not None:
            raise UsageError(f"{target} is a run that is finished; leave out --prompts and --out, or name a model")
        return read_view(folder), folder
    audit = _audited(target, scenario, prompts, out)
    assert audit.path is not None  # `gate` always names a place
    return audit.view, audit.path


def _audited(target: str, scenario: str, prompts: Path | None, out: Path | None) -> Audit:
    from kvdrift.cli.audit import audit_here

    kind, place = find_engine(target)
    return audit_here(kind, place, AuditPlan(), options.read_prompts(None, prompts), {}, scenario, out)


def _write_summary(view: dict[str, Any], worse: tuple[str, ...]) -> None:
    """Append to the file that GitHub Actions names; outside of it, say what is missing."""
    from kvdrift.report.ci import github_summary

    name = os.environ.get("GITHUB_STEP_SUMMARY")
    if not name:
        raise UsageError("--github-summary writes to the file that GITHUB_STEP_SUMMARY names, and nothing names one")
    try:
        with Path(name).open("a", encoding="utf-8") as file:
            file.write(github_summary(view, worse))
    except OSError as error:
        raise UsageError(f"cannot write {name}, which GITHUB_STEP_SUMMARY names: {error.strerror}") from error
