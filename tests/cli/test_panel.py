"""What a result ends in on a terminal, and what a pipe gets: no line over the width, no colour where none is wanted."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import termios
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from kvdrift.cli.pages import render_page
from kvdrift.cli.panel import panel, strip
from kvdrift.cli.screen import Screen
from kvdrift.pipeline.audit import Audit
from kvdrift.vocabulary.evidence import Verdict
from tests.support.audits import audited
from tests.support.command import kvdrift, process, refused

pytestmark = pytest.mark.xdist_group("slot_stale")

PIPE, TERMINAL = Screen(), Screen(framed=True, unicode=True)


def at(width: int, screen: Screen) -> Screen:
    return Screen(width, screen.framed, screen.unicode, screen.coloured)


@pytest.fixture(scope="module")
def stale() -> Audit:
    return audited("slot_stale").audit


@pytest.fixture
def run(stale: Audit, here: Path) -> Path:
    """The directory of a finished run."""
    (here / "run").mkdir()
    (here / "run" / "report.md").write_text(stale.to_markdown(), encoding="utf-8")
    (here / "run" / "report.json").write_text(stale.to_json(), encoding="utf-8")
    return here / "run"


def words(text: str) -> str:
    return " ".join(text.translate(str.maketrans("│╭╮╰╯─|+", " " * 8)).split())


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("screen", [PIPE, TERMINAL], ids=["pipe", "terminal"])
def test_the_panel_says_what_matters_and_no_line_is_over_the_width(stale: Audit, width: int, screen: Screen) -> None:
    shown = panel(stale.view, Path("runs/a"), at(width, screen))

    assert max(cell_len(line) for line in shown.splitlines()) <= width
    said = words(shown)
    for part in (
        "MISMATCH (semantic)",
        stale.view["about"],
        "p / pos 11 / layer 2 / k_cache / slot 5",
        "slot_stale: the slots 5 hold K rows that prefill wrote nowhere",
        "runs/a/report.md",
    ):
        assert part in said, part
    assert shown.isascii() is not screen.unicode
    assert "\x1b" not in shown


@pytest.mark.parametrize("width", [40, 80])
@pytest.mark.parametrize("screen", [PIPE, TERMINAL], ids=["pipe", "terminal"])
def test_no_line_of_a_whole_report_is_over_the_width(stale: Audit, width: int, screen: Screen) -> None:
    shown = render_page(stale.to_markdown(), at(width, screen))

    assert max(cell_len(line) for line in shown.splitlines()) <= width
    assert "Hypothesis Testing" in shown
    assert "**" not in shown
    assert "|--" not in shown
    for row in stale.view["hypotheses"]["evidence"]:
        assert words(at(width, screen).text(row["statistic"])) in words(shown)


def test_a_table_that_does_not_fit_becomes_a_list_of_its_rows() -> None:
    source = "| Mode | Pairs |\n|---|---|\n| as_designed | 12 within |\n"

    assert render_page(source, at(40, PIPE)).splitlines()[2] == "as_designed  12 within"
    assert render_page(source, at(20, PIPE)).splitlines()[:2] == ["as_designed", "  Pairs: 12 within"]


@pytest.mark.parametrize("verdict", list(Verdict))
def test_every_verdict_has_a_panel_with_its_reasons(stale: Audit, verdict: Verdict) -> None:
    reasons = [f"reason {n}" for n in range(5)] if verdict is Verdict.INCONCLUSIVE else []
    view = {**stale.view, "verdict": str(verdict), "first_failure": None, "diagnosis": None, "reasons": reasons}

    said = words(panel(view, None, TERMINAL))

    assert str(verdict) in said
    assert ("reason 2" in said) is bool(reasons)
    assert ("and 2 more reasons" in said) is bool(reasons)
    assert "report:" not in said


def test_the_strip_has_a_mark_a_layer_and_the_first_failure_its_own(stale: Audit) -> None:
    marks = stale.view["strip"]

    assert [mark["name"] for mark in marks] == ["embedding", "0", "1", "2", "head"]
    assert [mark["state"] for mark in marks] == ["equal", "within", "within", "first", "beyond"]
    assert PIPE.render(strip(marks, 60, PIPE)).splitlines()[0] == ".--X#"


def test_a_strip_of_many_layers_shows_the_worst_of_each_mark() -> None:
    marks = [{"name": str(n), "state": "beyond" if n == 77 else "within", "excess": None} for n in range(100)]

    line, *legend = PIPE.render(strip(marks, 20, PIPE)).splitlines()

    assert line == "-" * 15 + "#" + "-" * 4
    assert "5 a mark" in " ".join(legend)


def test_names_cannot_drive_a_terminal(stale: Audit) -> None:
    view = {**stale.view, "model": "\x1b[2J\x07\u202eevil ≤ é"}

    assert "[2Jevil <= e" in panel(view, None, PIPE)
    for screen in (PIPE, TERMINAL):
        assert not {"\x1b", "\x07", "\u202e"} & set(panel(view, None, screen))


def terminal_of(columns: int, folder: Path, *arguments: str, **env: str) -> tuple[str, int]:
    """Run the command on a terminal of its own; return what the terminal got, and the exit code."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    env = {"TERM": "xterm", "PYTHONIOENCODING": "utf-8", "NO_COLOR": "", "COLUMNS": "", **env}
    run = process(*arguments, cwd=folder, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    drawn = b""
    while True:
        try:
            data = os.read(ours, 65536)
        except OSError:  # the other end is closed
            break
        drawn += data
        if not data:
            break
    os.close(ours)
    return drawn.decode(), run.wait(60)


@pytest.mark.parametrize(("no_color", "term", "is_coloured"), [("", "xterm", True), ("1", "xterm", False)])
def test_a_terminal_of_40_columns(run: Path, no_color: str, term: str, is_coloured: bool) -> None:
    drawn, code = terminal_of(40, run.parent, "show", "run", NO_COLOR=no_color, TERM=term)

    assert code == 0
    assert ("\x1b[" in drawn) is is_coloured
    assert "╰" in drawn
    if not is_coloured:
        assert max(cell_len(line) for line in drawn.splitlines()) <= 40


def test_a_pipe_gets_ascii_that_ends_with_the_place_of_the_report(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for columns in (40, 80):
        monkeypatch.setenv("COLUMNS", str(columns))
        done = kvdrift("show", "run")

        assert done.code == 0
        assert done.out.isascii()
        assert max(map(len, done.out.splitlines())) <= columns
        assert words(done.out).endswith("report: run/report.md")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"schema_version": 1, "verd', "cannot read run/report.json: "),
        (
            '{"schema_version": 99, "verdict": "EXACT"}',
            "run/report.json has schema version 99, and this kvdrift knows ",
        ),
        ("[]", "cannot read run/report.json: "),
    ],
    ids=["half", "newer", "list"],
)
def test_a_report_that_cannot_be_read_is_one_line(run: Path, text: str, message: str) -> None:
    (run / "report.json").write_text(text)

    for options in ((), ("--json",), ("--markdown",)):
        done = kvdrift("show", "run", *options)
        assert (done.code, done.out, done.err.count("\n")) == (5, "", 1)
        assert done.err.startswith(f"kvdrift: {message}")


def test_a_report_without_its_markdown_is_one_line(run: Path) -> None:
    (run / "report.md").unlink()

    refused(
        kvdrift("show", "run"),
        5,
        "cannot read run/report.md: [Errno 2] No such file or directory: 'run/report.md'; is run the directory of a "
        "finished run?",
    )
    assert json.loads(kvdrift("show", "run", "--json").out)["verdict"] == "MISMATCH"


def test_facts_of_a_server_have_a_panel_too() -> None:
    view: dict[str, Any] = {
        "kind": "server",
        "verdict": "MISMATCH",
        "model": "m",
        "first_failure": {"text": "p / position 3 / decode_solo"},
        "diagnosis": "logprobs are one position late",
        "reasons": [],
    }

    said = words(panel(view, None, PIPE))

    assert "cause: logprobs are one position late" in said
    assert "(server)" not in said
