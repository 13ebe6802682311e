"""A verdict as continuous integration wants it: JUnit XML, and the summary and annotations of GitHub Actions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from xml.etree import ElementTree as ET

from kvdrift.report.lines import ten_lines

_PASSES = ("EXACT", "STRUCTURAL_DRIFT")


def junit(view: dict[str, Any], worse: Sequence[str] = ()) -> str:
    """Return JUnit XML: a test case for every route, and one for the comparison with a baseline.

    A MISMATCH is a failure and INCONCLUSIVE an error, so that neither is ever counted as passed.

    Args:
        view: a report as plain data.
        worse: what is worse than in the baseline.
    """
    suite = ET.Element("testsuite", name="kvdrift")
    subject = view.get("model") or view.get("report") or "server"
    for name, verdict, lines in _cases(view):
        case = ET.SubElement(suite, "testcase", classname=f"kvdrift.{_text(subject)}", name=name)
        if verdict not in _PASSES:
            what = "failure" if verdict == "MISMATCH" else "error"
            ET.SubElement(case, what, message=_text(lines[0]), type=verdict).text = _text("\n".join(lines))
    if worse:
        case = ET.SubElement(suite, "testcase", classname="kvdrift.baseline", name="baseline")
        ET.SubElement(case, "failure", message=_text(worse[0]), type="WORSE").text = _text("\n".join(worse))
    cases = list(suite)
    counts = {what: sum(case.find(what[:-1]) is not None for case in cases) for what in ("failures", "errors")}
    suite.attrib.update(tests=str(len(cases)), **{name: str(count) for name, count in counts.items()})
    ET.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"


def _cases(view: dict[str, Any]) -> Iterator[tuple[str, str, list[str]]]:
    rows = [row for row in view.get("scenarios", ()) if row["verdict"] is not None]
    leading = view.get("leading_scenario", "decode")
    if not any(row["name"] == leading for row in rows):
        yield "audit", view["verdict"], ten_lines(view, None)
    for row in rows:
        if row["name"] == leading:  # the verdict of the whole, which can be worse than that of the row
            yield row["name"], view["verdict"], ten_lines(view, None)
        else:
            cause = row["diagnosis"]["cause"] if row["diagnosis"] else ""
            parts = (f"first failure: {row['first_failure']}" if row["first_failure"] else "", cause, *row["reasons"])
            yield row["name"], row["verdict"], [f"{row['verdict']}: {row['name']}", *(part for part in parts if part)]


def _text(value: object) -> str:
    """A text with nothing that XML 1.0 cannot hold."""
    return "".join(c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" else "�" for c in str(value))


def github_summary(view: dict[str, Any], worse: Sequence[str] = ()) -> str:
    """Return the summary of a job as Markdown; what comes from files of others stands in a block of code."""
    lines = "\n".join(ten_lines(view, None)).replace("```", "'''")
    compared = "".join(f"\nworse than the baseline: {line}" for line in worse).replace("```", "'''")
    return f"### kvdrift: {view['verdict']}\n\n```text\n{lines}{compared}\n```\n"


def github_annotation(view: dict[str, Any], worse: Sequence[str] = ()) -> str | None:
    """Return the line that makes an annotation of GitHub Actions; None for a pass that is not worse."""
    if view["verdict"] in _PASSES and not worse:
        return None
    lines = ten_lines(view, None) if view["verdict"] not in _PASSES else list(worse)
    title = f"kvdrift {view['verdict']}" if view["verdict"] not in _PASSES else "kvdrift: worse than the baseline"
    text = "\n".join(lines).replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
    return f"::error title={title}::{text}"
