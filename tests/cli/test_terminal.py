"""Every verb at terminals of several widths, into a pipe and without colours: one rule for all of them."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import pty
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.cells import cell_len
from rich.text import Text

from kvdrift.cli.app import app
from kvdrift.cli.screen import Screen
from tests.support.command import kvdrift
from tests.support.verbs import VERBS, arguments_of, filled

__all__ = ["filled"]

pytestmark = pytest.mark.xdist_group("terminal")

_number = itertools.count().__next__


@contextlib.contextmanager
def terminal() -> Iterator[tuple[io.TextIOWrapper, list[bytes]]]:
    """Yield a file that is a terminal, and what it gets."""
    ours, theirs = pty.openpty()
    drawn: list[bytes] = []

    def read() -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while data := os.read(ours, 65536):
                drawn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    with open(theirs, "w", encoding="utf-8") as file:
        yield file, drawn
    reader.join(10)
    os.close(ours)


def drawn_by(verb: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run a verb in this process, on a terminal of its own."""
    with terminal() as (file, drawn), monkeypatch.context() as patch:
        patch.setattr("sys.stdout", file)
        with contextlib.suppress(SystemExit):
            app(arguments_of(verb, _number))
        file.flush()
    return b"".join(drawn).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [40, 80, 120])
@pytest.mark.parametrize("verb", VERBS)
def test_no_line_is_over_the_width_of_the_terminal(
    verb: str, columns: int, filled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(filled)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("NO_COLOR", "1" if columns == 80 else "")

    drawn = drawn_by(verb, monkeypatch)

    assert drawn.strip(), "nothing was printed"
    assert ("\x1b[" in drawn) <= (columns != 80), "NO_COLOR"
    lines = [Text.from_ansi(line).plain for line in drawn.splitlines()]
    assert [line for line in lines if cell_len(line) > columns] == []


@pytest.mark.parametrize("verb", VERBS)
def test_a_pipe_gets_plain_ascii(verb: str, filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(filled)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("COLUMNS", raising=False)

    done = kvdrift(*arguments_of(verb, _number))

    assert done.out.strip()
    assert done.out.isascii()
    assert "\x1b" not in done.out


def test_a_line_into_a_pipe_is_whole_unless_columns_are_named(filled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(filled)
    monkeypatch.delenv("COLUMNS", raising=False)
    whole = kvdrift("scenarios").out
    monkeypatch.setenv("COLUMNS", "40")
    broken = kvdrift("scenarios").out

    assert max(map(len, whole.splitlines())) > 80
    assert max(map(len, broken.splitlines())) <= 40
    assert broken.split() == whole.split()


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        ("a short line", ["a short line"]),
        ("  worse: layer 1 / mlp_out drifts", ["  worse: layer 1 /", "    mlp_out drifts"]),
        ("report: " + "x" * 30, ["report:", "  " + "x" * 18, "  " + "x" * 12]),
        ("x" * 45, ["x" * 20, "  " + "x" * 18, "  " + "x" * 7]),
        ("名" * 15, ["名" * 10, "  " + "名" * 5]),
        ("", [""]),
    ],
)
def test_where_lines_are_broken(line: str, parts: list[str]) -> None:
    assert Screen(width=20, unicode=True).lines([line]).splitlines() == parts
