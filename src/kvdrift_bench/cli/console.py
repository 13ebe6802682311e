"""What the commands of the benchmark share: errors as one message, and progress beside the result."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kvdrift.errors import EngineUnavailable
from kvdrift_bench.run.options import EngineChoice

if TYPE_CHECKING:
    from kvdrift.cli.progress import TerminalProgress


# Options of every command.
Out = Annotated[
    Path | None,
    typer.Option(
        help="JSON Lines, one record per run; existing records are skipped, so an interrupted benchmark resumes."
    ),
]
Markdown = Annotated[Path | None, typer.Option(help="A document to put the figures into, between markers.")]


def what_is_left(out: Path | None) -> str:
    """What an interrupted benchmark leaves behind, with its runs in `out`."""
    if out is None:
        return "nothing was kept; --out FILE keeps each run as it is measured"
    return f"{out} holds what was measured, and the same command goes on from there"


@contextmanager
def measuring(engine: EngineChoice = "hf") -> Iterator[TerminalProgress]:
    """Show progress on stderr while the context is open, where whatever a model prints goes too.

    Raises:
        EngineUnavailable: torch or transformers is not installed, and `engine` needs them.
    """
    from kvdrift.cli.progress import terminal_progress

    if engine == "hf":
        try:
            import torch  # noqa: F401
            import transformers  # noqa: F401
        except ModuleNotFoundError as error:
            raise EngineUnavailable(f"the benchmark needs {error.name!r}; pip install 'kvdrift[hf]'") from error
    with terminal_progress() as progress, redirect_stdout(sys.stderr):
        yield progress
