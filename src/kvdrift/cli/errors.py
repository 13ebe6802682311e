"""Errors on the command line: one message on stderr, and an exit code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

from kvdrift.errors import KvdriftError


@contextmanager
def errors_as_messages(left: str = "nothing was written") -> Iterator[None]:
    """Turn what kvdrift raises on purpose into one message on stderr and its exit code; `left` says what an
    interrupted command leaves behind."""
    try:
        yield
    except KvdriftError as error:
        typer.echo(f"kvdrift: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as error:
        typer.echo(f"kvdrift: interrupted; {left}", err=True)
        raise typer.Exit(130) from error
