"""What the commands write to stdout: the result, and nothing else."""

from __future__ import annotations

import io
import os
import shlex
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer

EXIT_CODES = (
    "Exit codes: 0 EXACT or STRUCTURAL_DRIFT, 1 MISMATCH, 2 usage, 3 engine unavailable, 4 capture failed, "
    "5 bad trace, 6 INCONCLUSIVE, 130 interrupted."
)


def print_result(text: str) -> None:
    """Write to stdout. A reader that has seen enough (`| head`) is not an error, and leaves the exit code as it is."""
    try:
        typer.echo(text, nl=not text.endswith("\n"))
    except BrokenPipeError:
        # Python flushes stdout once more at its end, and would complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def print_lines(lines: Iterable[str]) -> None:
    """Write plain lines to stdout as it can show them: see `kvdrift.cli.screen`."""
    from kvdrift.cli.screen import Screen

    print_result(Screen.of_stdout().lines(lines))


def page_and_panel(markdown: str, view: Mapping[str, Any], path: Path | None) -> str:
    """Return a report as stdout can show it, with the panel at its end."""
    from kvdrift.cli.pages import render_page
    from kvdrift.cli.panel import panel
    from kvdrift.cli.screen import Screen

    screen = Screen.of_stdout()
    return f"{render_page(markdown, screen)}{panel(view, path, screen)}"


def prepare_stdout() -> None:
    """Let stdout replace what a terminal's encoding lacks: a report has characters that some do not know."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def command_line() -> str:
    """Return the command as it was typed; a report names it to be reproduced."""
    return shlex.join(["kvdrift", *sys.argv[1:]])
