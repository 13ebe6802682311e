"""A summary for people and for continuous integration: the page with the matrix, and JUnit XML."""

from __future__ import annotations

from xml.etree import ElementTree as ET

from jinja2 import Environment, PackageLoader, StrictUndefined

from kvdrift.report.schema.others import SweepCellView, SweepView

_AXES = ("model", "engine", "dtype", "attention", "cache", "prompt", "lengths", "seed")
SIGN = {"PASS": "=", "FAIL": "≠", "INCONCLUSIVE": "?", "ERROR": "!", "NOT_APPLICABLE": "–", "MISSING": "·"}


def render_page(view: SweepView) -> str:
    """Return report.html: a row for each combination, a column for each scenario, a cell a link to its report."""
    environment = Environment(
        loader=PackageLoader("kvdrift.sweep"),
        undefined=StrictUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    axes = varying(view)
    columns = list(dict.fromkeys(cell.scenario for cell in view.cells))
    rows: dict[tuple[str, ...], dict[str, SweepCellView]] = {}
    for cell in view.cells:
        rows.setdefault(tuple(value_of(cell, axis) for axis in axes), {})[cell.scenario] = cell
    return environment.get_template("sweep.html.jinja").render(
        view=view, axes=axes, columns=columns, rows=rows, sign=SIGN
    )


def varying(view: SweepView) -> list[str]:
    """Return the axes that have more than one value, the model always among them."""
    return [axis for axis in _AXES if axis == "model" or len({getattr(cell, axis) for cell in view.cells}) > 1]


def value_of(cell: SweepCellView, axis: str) -> str:
    """Return the value of an axis as a table shows it."""
    value = getattr(cell, axis)
    return "default" if value is None else str(value)


def junit(view: SweepView) -> str:
    """Return JUnit XML: FAIL is a failure, NOT_APPLICABLE is skipped, what else is no PASS is an error."""
    suite = ET.Element("testsuite", name=_text(f"kvdrift sweep {view.name}"))
    kinds = {"FAIL": "failure", "NOT_APPLICABLE": "skipped"}
    counts = dict.fromkeys(("failure", "error", "skipped"), 0)
    for cell in view.cells:
        seconds = f"{cell.seconds or 0:.3f}"
        case = ET.SubElement(
            suite, "testcase", classname=_text(f"kvdrift.{cell.model}"), name=_text(cell.id), time=seconds
        )
        if cell.state != "PASS":
            kind = kinds.get(cell.state, "error")
            counts[kind] += 1
            said = "; ".join(part for part in (cell.first_failure, cell.cause, *cell.reasons) if part)
            ET.SubElement(case, kind, message=_text(f"{cell.state}: {said}" if said else cell.state))
    suite.attrib.update(
        tests=str(len(view.cells)),
        failures=str(counts["failure"]),
        errors=str(counts["error"]),
        skipped=str(counts["skipped"]),
    )
    ET.indent(suite)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suite, encoding="unicode") + "\n"


def _text(value: str) -> str:
    """A text with nothing that XML 1.0 cannot hold."""
    return "".join(c if c in "\t\n\r" or " " <= c <= "\ud7ff" or "\ue000" <= c <= "\ufffd" else "\ufffd" for c in value)


__all__ = ["junit", "render_page", "value_of", "varying"]
